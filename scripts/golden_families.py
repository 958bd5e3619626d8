"""Tiny models of every family of decoders: their configurations, in both dialects, with fields set to unusual values."""

BASE = {"vocab_size": 131, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
LLAMA = BASE | {
    "hidden_size": 48,
    "head_dim": 16,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
FALCON = BASE | {
    "architectures": ["FalconForCausalLM"],
    "model_type": "falcon",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "layer_norm_epsilon": 1e-5,
    "activation": "gelu",
    "alibi": False,
    "bias": False,
    "multi_query": True,
    "new_decoder_architecture": False,
    "parallel_attn": True,
    "tie_word_embeddings": True,
}
NEOX = BASE | {
    "architectures": ["GPTNeoXForCausalLM"],
    "model_type": "gpt_neox",
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
PHI = {k: v for k, v in LLAMA.items() if k != "head_dim"} | {"hidden_size": 64}
GEMMA = LLAMA | {"head_dim": 32, "rms_norm_eps": 1e-6, "tie_word_embeddings": True}
DEEPSEEK = {k: v for k, v in LLAMA.items() if k != "head_dim"} | {
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "moe_intermediate_size": 32,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "attention_bias": False,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 4.0, "beta_slow": 0.5}


def new(architecture, model_type, **fields):
    """In the dialect of transformers 5."""
    return {"architectures": [architecture], "model_type": model_type, "dtype": "bfloat16", **fields}


def old(architecture, model_type, **fields):
    """In the dialect of transformers 4."""
    return {"architectures": [architecture], "model_type": model_type, "torch_dtype": "bfloat16", **fields}


def rope(theta, **fields):
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta, **fields}}


# fixture: config
FAMILIES = {
    "mistral": LLAMA | old("MistralForCausalLM", "mistral", head_dim=32, sliding_window=8, rope_theta=5000.0),
    "mixtral": LLAMA
    | new(
        "MixtralForCausalLM",
        "mixtral",
        intermediate_size=32,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=None,
        **rope(1e6),
    ),
    "granite": LLAMA
    | old(
        "GraniteForCausalLM",
        "granite",
        rope_theta=10000.0,
        rope_scaling=None,
        attention_bias=True,
        mlp_bias=True,
        tie_word_embeddings=False,
        embedding_multiplier=6.0,
        residual_multiplier=0.22,
        attention_multiplier=0.125,
        logits_scaling=3.0,
    ),
    "smollm3": LLAMA
    | new(
        "SmolLM3ForCausalLM",
        "smollm3",
        num_hidden_layers=3,
        no_rope_layers=[1, 0, 1],
        tie_word_embeddings=True,
        use_sliding_window=False,
        sliding_window=None,
        layer_types=["full_attention"] * 3,
        **rope(5e4),
    ),
    "qwen2": LLAMA
    | old(
        "Qwen2ForCausalLM",
        "qwen2",
        tie_word_embeddings=True,
        rope_theta=1e4,
        use_sliding_window=False,
        sliding_window=16,
        max_window_layers=1,
    ),
    "qwen2_window": LLAMA
    | old(
        "Qwen2ForCausalLM", "qwen2", rope_theta=1e4, use_sliding_window=True, sliding_window=8, max_window_layers=1
    ),
    "qwen2_moe": LLAMA
    | new(
        "Qwen2MoeForCausalLM",
        "qwen2_moe",
        decoder_sparse_step=2,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=48,
        norm_topk_prob=False,
        qkv_bias=True,
        mlp_only_layers=[],
        use_sliding_window=False,
        layer_types=["full_attention"] * 2,
        **rope(1e4),
    ),
    "qwen3": LLAMA
    | new("Qwen3ForCausalLM", "qwen3", head_dim=32, attention_bias=True, tie_word_embeddings=True, **rope(1e4)),
    "qwen3_yarn": LLAMA | old("Qwen3ForCausalLM", "qwen3", head_dim=32, rope_theta=100.0, rope_scaling=YARN),
    "qwen3_moe": LLAMA
    | old(
        "Qwen3MoeForCausalLM",
        "qwen3_moe",
        head_dim=32,
        num_key_value_heads=1,
        num_experts=6,
        num_experts_per_tok=3,
        moe_intermediate_size=32,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        mlp_only_layers=[0],
        rope_theta=1e4,
    ),
    "gemma1": GEMMA | old("GemmaForCausalLM", "gemma", num_key_value_heads=1, hidden_act="gelu", rope_theta=1e4),
    "gemma2": GEMMA
    | old(
        "Gemma2ForCausalLM",
        "gemma2",
        hidden_activation="gelu_pytorch_tanh",
        query_pre_attn_scalar=24,
        sliding_window=8,
        attn_logit_softcapping=5.0,
        final_logit_softcapping=3.0,
        rope_theta=1e4,
    ),
    "gemma3": GEMMA
    | new(
        "Gemma3ForCausalLM",
        "gemma3_text",
        hidden_activation="gelu_pytorch_tanh",
        num_hidden_layers=3,
        query_pre_attn_scalar=24,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e5},
        },
    ),
    "gemma3_pattern": GEMMA
    | old(
        "Gemma3ForCausalLM",
        "gemma3_text",
        hidden_activation="gelu_pytorch_tanh",
        query_pre_attn_scalar=24,
        sliding_window=8,
        sliding_window_pattern=2,
        rope_theta=1e5,
        rope_local_base_freq=1e3,
        rope_scaling={"rope_type": "linear", "factor": 4.0},
        final_logit_softcapping=20.0,
    ),
    "phi3": PHI | old("Phi3ForCausalLM", "phi3", sliding_window=16, rope_theta=1e4, rope_scaling=None),
    "phi3_longrope": PHI
    | old(
        "Phi3ForCausalLM",
        "phi3",
        tie_word_embeddings=True,
        partial_rotary_factor=0.75,
        original_max_position_embeddings=32,
        rope_theta=1e4,
        rope_scaling={
            "type": "longrope",
            "short_factor": [1.0 + 0.05 * i for i in range(6)],
            "long_factor": [1.0 + 0.5 * i for i in range(6)],
        },
    ),
    "olmo2": LLAMA | new("Olmo2ForCausalLM", "olmo2", attention_bias=False, **rope(5e4)),
    "cohere": {k: v for k, v in LLAMA.items() if k != "rms_norm_eps"}
    | new(
        "CohereForCausalLM",
        "cohere",
        layer_norm_eps=1e-5,
        use_qk_norm=True,
        logit_scale=0.4,
        tie_word_embeddings=True,
        **rope(1e4),
    ),
    "falcon7b": FALCON | old("FalconForCausalLM", "falcon", rope_theta=2e4),
    "falcon40b": FALCON
    | old(
        "FalconForCausalLM",
        "falcon",
        rope_theta=1e4,
        num_kv_heads=2,
        new_decoder_architecture=True,
        bias=True,
        tie_word_embeddings=False,
    ),
    "falcon11b": FALCON
    | new(
        "FalconForCausalLM",
        "falcon",
        num_kv_heads=2,
        new_decoder_architecture=True,
        num_ln_in_parallel_attn=1,
        ffn_hidden_size=96,
        **rope(500042.0),
    ),
    "falcon_rw": FALCON
    | new("FalconForCausalLM", "falcon", alibi=True, multi_query=False, parallel_attn=False, bias=True),
    "gpt2": BASE
    | old(
        "GPT2LMHeadModel",
        "gpt2",
        n_embd=64,
        n_layer=2,
        n_head=4,
        n_inner=80,
        n_positions=128,
        layer_norm_epsilon=1e-5,
        activation_function="gelu_new",
        scale_attn_weights=True,
        scale_attn_by_inverse_layer_idx=True,
        tie_word_embeddings=True,
    ),
    "gpt_neox": NEOX
    | old("GPTNeoXForCausalLM", "gpt_neox", rotary_pct=0.5, rotary_emb_base=5000, use_parallel_residual=True),
    "gpt_neox_sequential": NEOX
    | new(
        "GPTNeoXForCausalLM",
        "gpt_neox",
        attention_bias=False,
        use_parallel_residual=False,
        **rope(1e4, partial_rotary_factor=1.0),
    ),
    "starcoder2": {k: v for k, v in LLAMA.items() if k != "rms_norm_eps"}
    | old(
        "Starcoder2ForCausalLM",
        "starcoder2",
        intermediate_size=80,
        norm_epsilon=1e-5,
        hidden_act="gelu_pytorch_tanh",
        use_bias=True,
        sliding_window=12,
        tie_word_embeddings=True,
        rope_theta=1e4,
    ),
    "gpt_oss": LLAMA
    | new(
        "GptOssForCausalLM",
        "gpt_oss",
        intermediate_size=32,
        head_dim=32,
        num_local_experts=4,
        num_experts_per_tok=2,
        attention_bias=True,
        sliding_window=8,
        swiglu_limit=3.0,
        layer_types=["sliding_attention", "full_attention"],
        rope_parameters=YARN | {"rope_theta": 150.0, "truncate": False},
    ),
    "deepseek_v2": DEEPSEEK
    | old(
        "DeepseekV2ForCausalLM",
        "deepseek_v2",
        q_lora_rank=None,
        n_shared_experts=2,
        topk_group=1,
        topk_method="group_limited_greedy",
        routed_scaling_factor=1.5,
        norm_topk_prob=False,
        rope_theta=100.0,
        rope_scaling={"type": "yarn"}
        | {k: v for k, v in YARN.items() if k != "rope_type"}
        | {"mscale": 1.0, "mscale_all_dim": 0.7},
    ),
    "deepseek_v3": DEEPSEEK
    | new(
        "DeepseekV3ForCausalLM",
        "deepseek_v3",
        q_lora_rank=32,
        n_shared_experts=1,
        attention_bias=True,
        routed_scaling_factor=2.5,
        norm_topk_prob=True,
        rope_interleave=True,
        rope_parameters=YARN | {"rope_theta": 100.0, "mscale": 1.0, "mscale_all_dim": 1.0},
    ),
}

# Seeds whose greedy text is varied and nowhere near a tie; `make_goldens.py --search` finds them.
SEEDS = {
    "mistral": 0,
    "mixtral": 0,
    "granite": 2,
    "smollm3": 0,
    "qwen2": 0,
    "qwen2_window": 0,
    "qwen2_moe": 0,
    "qwen3": 3,
    "qwen3_yarn": 0,
    "qwen3_moe": 0,
    "gemma1": 6,
    "gemma2": 0,
    "gemma3": 0,
    "gemma3_pattern": 1,
    "phi3": 0,
    "phi3_longrope": 1,
    "olmo2": 0,
    "cohere": 2,
    "falcon7b": 5,
    "falcon40b": 5,
    "falcon11b": 5,
    "falcon_rw": 0,
    "gpt2": 7,
    "gpt_neox": 1,
    "gpt_neox_sequential": 3,
    "starcoder2": 3,
    "gpt_oss": 0,
    "deepseek_v2": 0,
    "deepseek_v3": 2,
}

# The reference path that is right: the eager one of transformers 5.23 adds linear biases twice.
ATTENTION = {"falcon_rw": "sdpa"}
