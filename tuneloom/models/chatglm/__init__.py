"""ChatGLM2 and ChatGLM3 in their original layout, on transformers' native Glm classes; no code of theirs is run."""
