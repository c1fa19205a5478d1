"""The ops behind the substitutions. One file is one op: reference, providers, registration."""
