"""The APIs of hosted services, for clients that were written for them, one module each. `vendor` is what they share."""
