"""How families of models write calls of functions, one module for each way."""
