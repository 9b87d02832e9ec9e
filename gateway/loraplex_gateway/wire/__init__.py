"""Reading requests and writing answers, whatever they are about."""
