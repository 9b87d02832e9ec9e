"""`/v1/responses`, as far as nothing has to be kept from one call to the next."""
