"""Tools that the agent loop runs in the sandbox: Anthropic's own bash and text-editor types."""
