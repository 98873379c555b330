"""To and from Hugging Face's JetMoE: names, configuration, files, tokenizer. Importing it imports nothing."""
