"""The elephas backend of dlspark."""
