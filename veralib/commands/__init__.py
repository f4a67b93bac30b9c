"""One file a command of `vera`; cli.py lists them. Imports of torch and transformers stay inside the functions."""
