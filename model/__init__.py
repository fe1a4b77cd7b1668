"""What is computed: the Llama decoder, its weights, its tokenizers. Knows nothing of Ray, HTTP or requests."""
