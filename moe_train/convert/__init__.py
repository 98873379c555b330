"""To and from Hugging Face's models: names, configuration, files, tokenizer. Importing it imports nothing."""
