"""Text: the tokenizer, documents, and rows of token ids."""
