"""e2a: a self-hosted platform that gives an AI agent its own sandbox."""
