"""From a captured graph to a rewritten one: canonicalize, propose, check, prove, replace."""
