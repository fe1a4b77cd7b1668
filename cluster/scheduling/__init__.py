"""Which tokens the next batch computes: who runs, what each holds, who is next. No clock, no thread, no tensors."""
