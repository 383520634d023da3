"""Where a sandbox may connect to: the rules, and what is checked of a connection. Pure; the gateway carries it out."""
