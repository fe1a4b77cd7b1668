"""The shapes of the Llama 2 family, as one table, and which of them a checkpoint has."""

from model.config import CODE_LLAMA_THETA, ModelConfig

_ROWS = (
    # name                  dim   layers heads kv  hidden  vocab  theta      context
    ("llama-2-7b",          4096, 32,    32,   32, 11008,  32000, 10_000.0,  4096),
    ("llama-2-13b",         5120, 40,    40,   40, 13824,  32000, 10_000.0,  4096),
    ("llama-2-70b",         8192, 80,    64,   8,  28672,  32000, 10_000.0,  4096),
    ("code-llama-7b",       4096, 32,    32,   32, 11008,  32016, 1e6,       16_384),
    ("code-llama-13b",      5120, 40,    40,   40, 13824,  32016, 1e6,       16_384),
    ("code-llama-34b",      8192, 48,    64,   8,  22016,  32000, 1e6,       16_384),
    ("code-llama-70b",      8192, 80,    64,   8,  28672,  32016, 1e6,       16_384),
    ("code-llama-7b-python", 4096, 32,   32,   32, 11008,  32000, 1e6,       16_384),
    ("code-llama-13b-python", 5120, 40,  40,   40, 13824,  32000, 1e6,       16_384),
    ("test-1m",             128,  4,      4,    2,  384,   2048,  10_000.0,  2048),  # for tests of all but the model
    ("test-50m",            512,  16,    8,    4,  1408,   4096,  10_000.0,  4096),  # for benchmarks on a CPU
)  # fmt: skip

SHAPES: dict[str, ModelConfig] = {
    name: ModelConfig(
        dim=dim,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=dim // n_heads,
        hidden_dim=hidden_dim,
        vocab_size=vocab_size,
        norm_eps=1e-5,
        rope_theta=theta,
        max_position_embeddings=context,
        tie_word_embeddings=False,
    )
    for name, dim, n_layers, n_heads, n_kv_heads, hidden_dim, vocab_size, theta, context in _ROWS
}


def family_of(config: ModelConfig) -> str:
    """Name of the shape that `config` is, fine-tunes with a few more tokens included, or "Llama" for any other."""

    def body(c: ModelConfig) -> tuple[object, ...]:
        code = c.rope_theta >= CODE_LLAMA_THETA
        return c.dim, c.n_layers, c.n_heads, c.n_kv_heads, c.hidden_dim, code, c.tie_word_embeddings

    near = [name for name, shape in SHAPES.items() if body(shape) == body(config)]
    return min(near, key=lambda name: abs(SHAPES[name].vocab_size - config.vocab_size), default="Llama")
