"""The OpenAI-compatible HTTP server: `prefixkit serve`, needs the extra `serve`."""
