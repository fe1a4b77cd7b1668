"""What text becomes: tokenizers, chat templates, prompt formats, grammars. Nothing here needs torch."""
