"""Text: the tokenizer, documents, and samples of token ids."""
