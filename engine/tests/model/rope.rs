//! Expected values: `LlamaRotaryEmbedding` of Hugging Face transformers 5.23 with PyTorch 2 in f32 on a CPU.

use std::path::Path;

use serde_json::{Value, json};
use tidemill_engine::model::{ModelSpec, RopeSpec, rope_table};

struct Case {
    rope: Value,
    head_dim: usize,
    max_positions: usize,
    attention_factor: f64,
    /// (index, frequency)
    inv_freq: [(usize, f32); 5],
    position: usize,
    /// (index, cosine, sine) at that position
    table: [(usize, f32, f32); 4],
}

fn spec(rope: &Value, head_dim: usize, max_positions: usize) -> RopeSpec {
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "vocab_size": 16, "hidden_size": 8, "intermediate_size": 8,
        "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": head_dim, "rms_norm_eps": 1e-5,
        "max_position_embeddings": max_positions, "rope_parameters": rope,
    });
    ModelSpec::from_json(Path::new("config.json"), config.to_string().as_bytes()).unwrap().ropes.remove(0)
}

/// One unit in the last place: PyTorch's vectorised power is not always correctly rounded; ours is. Among the frequencies of
/// these cases that concerns 3, none of them with a base below 150,000.
fn close(got: f32, want: f32) -> bool {
    got.to_bits().abs_diff(want.to_bits()) <= 1
}

#[test]
#[allow(clippy::excessive_precision, clippy::approx_constant)]
fn frequencies_and_table_are_those_of_transformers() {
    let cases = [
        Case {
            rope: json!({"rope_type": "default", "rope_theta": 500000.0}),
            head_dim: 128,
            max_positions: 8192,
            attention_factor: 1.0,
            inv_freq: [
                (0, 1.0),
                (1, 0.814617217),
                (21, 0.0134904198),
                (32, 0.00141421345),
                (63, 2.4551407e-06),
            ],
            position: 1000,
            table: [
                (0, 0.562379062, 0.826879561),
                (21, 0.602594018, 0.7980479),
                (32, 0.155943841, 0.987765908),
                (63, 0.99999702, 0.00245513814),
            ],
        },
        Case {
            rope: json!({"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0}),
            head_dim: 64,
            max_positions: 4096,
            attention_factor: 1.0,
            inv_freq: [
                (0, 0.333333343),
                (1, 0.249964729),
                (10, 0.018744709),
                (16, 0.00333333318),
                (31, 4.44507168e-05),
            ],
            position: 1000,
            table: [
                (0, 0.947803199, 0.318856001),
                (10, 0.994508564, -0.104654916),
                (16, -0.981674016, -0.190567881),
                (31, 0.999012232, 0.0444360785),
            ],
        },
        Case {
            rope: json!({"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}),
            head_dim: 128,
            max_positions: 131072,
            attention_factor: 1.0,
            inv_freq: [
                (0, 1.0),
                (1, 0.814617217),
                (21, 0.0134904198),
                (32, 0.000524846022),
                (63, 3.06892588e-07),
            ],
            position: 1000,
            table: [
                (0, 0.562379062, 0.826879561),
                (21, 0.602594018, 0.7980479),
                (32, 0.865401089, 0.501079738),
                (63, 0.99999994, 0.000306892587),
            ],
        },
        Case {
            rope: json!({"rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}),
            head_dim: 32,
            max_positions: 256,
            attention_factor: 1.0,
            inv_freq: [
                (0, 1.0),
                (1, 0.190485314),
                (5, 0.000517513778),
                (8, 4.41941702e-05),
                (15, 1.41927202e-07),
            ],
            position: 1000,
            table: [
                (0, 0.562379062, 0.826879561),
                (5, 0.869051874, 0.494720995),
                (8, 0.999023616, 0.044179786),
                (15, 1.0, 0.000141927201),
            ],
        },
        Case {
            rope: json!({"rope_type": "yarn", "rope_theta": 1000000.0, "factor": 4.0, "original_max_position_embeddings": 32768}),
            head_dim: 128,
            max_positions: 131072,
            attention_factor: 1.138629436111989,
            inv_freq: [
                (0, 1.0),
                (1, 0.805842221),
                (21, 0.0107460786),
                (32, 0.000602941145),
                (63, 3.10234441e-07),
            ],
            position: 1000,
            table: [
                (0, 0.640341341, 0.941509426),
                (21, -0.281145155, -1.10337412),
                (32, 0.937856436, 0.645679712),
                (63, 1.13862932, 0.000353242067),
            ],
        },
        Case {
            rope: json!({"rope_type": "yarn", "rope_theta": 150000.0, "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": false, "original_max_position_embeddings": 4096}),
            head_dim: 64,
            max_positions: 131072,
            attention_factor: 1.3465735902799727,
            inv_freq: [
                (0, 1.0),
                (1, 0.689044297),
                (10, 0.0193349998),
                (16, 0.000456483918),
                (31, 3.0235114e-07),
            ],
            position: 1000,
            table: [
                (0, 0.75728482, 1.11345422),
                (10, 1.19100165, 0.628311694),
                (16, 1.20869517, 0.593562603),
                (31, 1.34657347, 0.000407138054),
            ],
        },
        Case {
            rope: json!({"rope_type": "yarn", "rope_theta": 10000.0, "factor": 40.0, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 0.5, "original_max_position_embeddings": 4096}),
            head_dim: 64,
            max_positions: 163840,
            attention_factor: 1.1557219901962608,
            inv_freq: [
                (0, 1.0),
                (1, 0.749894202),
                (10, 0.0562341288),
                (16, 0.00550000044),
                (31, 3.33380353e-06),
            ],
            position: 1000,
            table: [
                (0, 0.649953842, 0.955642939),
                (10, 1.09902072, -0.357556999),
                (16, 0.819025636, -0.815408111),
                (31, 1.15571558, 0.00385294296),
            ],
        },
        Case {
            rope: json!({"rope_type": "yarn", "rope_theta": 10000.0, "factor": 16.0, "attention_factor": 1.25, "original_max_position_embeddings": 1024}),
            head_dim: 64,
            max_positions: 16384,
            attention_factor: 1.25,
            inv_freq: [
                (0, 1.0),
                (1, 0.749894202),
                (10, 0.035957396),
                (16, 0.00206730748),
                (31, 8.3345094e-06),
            ],
            position: 1000,
            table: [
                (0, 0.702973843, 1.0335995),
                (10, -0.212608874, -1.23178625),
                (16, -0.595451057, 1.09906232),
                (31, 1.24995661, 0.0104180155),
            ],
        },
    ];
    for case in cases {
        let rope = spec(&case.rope, case.head_dim, case.max_positions);
        let name = &case.rope;
        assert_eq!(rope.attention_factor(), case.attention_factor, "{name}");
        let inv_freq = rope.inv_freq(case.max_positions);
        assert_eq!(inv_freq.len(), case.head_dim / 2);
        for (i, want) in case.inv_freq {
            assert!(close(inv_freq[i], want), "{name}: frequency {i} is {}, not {want}", inv_freq[i]);
        }
        let table = rope_table(&rope, case.position + 1);
        assert_eq!(table.len(), (case.position + 1) * case.head_dim);
        let row = &table[case.position * case.head_dim..];
        for (i, cos, sin) in case.table {
            let got = (row[i], row[case.head_dim / 2 + i]);
            // What one unit in the last place of the frequency makes of the angle, and rounding.
            let tolerance = case.position as f32 * inv_freq[i] * 2.4e-7 + 3e-7;
            let near = |got: f32, want: f32| (got - want).abs() < tolerance;
            assert!(
                near(got.0, cos) && near(got.1, sin),
                "{name}: entry {i} is {got:?}, not {:?}",
                (cos, sin)
            );
        }
    }
}

#[test]
fn position_zero_turns_nothing() {
    let rope = spec(&json!({"rope_type": "default", "rope_theta": 10000.0}), 8, 16);
    assert_eq!(rope_table(&rope, 1), [1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0]);
    assert!(rope_table(&rope, 0).is_empty());
}

/// Both ends of the ramp fall on one dimension: the reference avoids the division by zero.
#[test]
fn a_yarn_ramp_of_no_width_is_finite() {
    let yarn = json!({"rope_type": "yarn", "factor": 4.0, "beta_fast": 1.0, "beta_slow": 1.0, "truncate": false,
        "original_max_position_embeddings": 32, "rope_theta": 10000.0});
    for head_dim in [2, 4, 64] {
        let rope = spec(&yarn, head_dim, 128);
        assert!(rope.inv_freq(128).iter().all(|freq| freq.is_finite() && *freq > 0.0));
    }
}
