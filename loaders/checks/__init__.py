"""What can be wrong with a data set, one concept a module; ``loaders.preflight`` puts them together."""
