"""Prompts to rollouts: a vLLM engine whose every token is stamped with a version."""
