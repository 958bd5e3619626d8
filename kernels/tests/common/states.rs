//! `Ops::states` on any device.

use std::sync::Arc;

use tidemill_kernels::{
    DType, Ops,
    ops::{BatchMeta, Lookup},
};

use crate::common::tensor;

pub const VOCAB: usize = 24;
pub const MAX_TOKENS: usize = 16;
const WIDTH: usize = 64;

/// The row of a token in the table, exact in bf16.
fn row(token: u32) -> Vec<f32> {
    (0..WIDTH).map(|h| token as f32 + h as f32 / 128.0).map(|x| half::bf16::from_f32(x).to_f32()).collect()
}

/// Steps that want hidden states of some of their tokens, or of none, two in flight at a time: each gets its own, in order, with no row of
/// logits beside them or with some.
pub fn states_come_with_their_step<O: Ops>(ops: &O) {
    let values: Vec<f32> = (0..VOCAB as u32).flat_map(row).collect();
    let table = ops.weight(&[tensor(DType::Bf16, &[VOCAB, WIDTH], &values, 0).into()], &[]).unwrap();
    let mut hidden = ops.buffer(MAX_TOKENS * WIDTH).unwrap();
    let mut gathered = ops.buffer(MAX_TOKENS * WIDTH).unwrap();
    let mut launch = |tokens: &[u32], logits: &[u32], wanted: &[u32]| {
        let count = tokens.len() as u32;
        let meta = BatchMeta {
            token_ids: tokens.to_vec(),
            positions: (0..count).collect(),
            slot_mapping: (0..count).collect(),
            cu_seqlens_q: vec![0, count],
            context_lens: vec![count],
            block_tables: vec![0],
            max_blocks: 1,
            logits_indices: logits.to_vec(),
            state_indices: wanted.to_vec(),
            ..BatchMeta::default()
        };
        // Nobody asks for what the rows of logits give.
        let batch = ops.upload(Arc::new(meta), Arc::new([])).unwrap();
        let extent = ops.extent(&batch);
        assert_eq!((extent.logits_rows, extent.state_rows), (logits.len(), wanted.len()));
        ops.run(&batch, || {
            ops.embedding(&mut hidden, &table, &batch, Lookup::Tokens { scale: 1.0 })?;
            if extent.state_rows > 0 {
                let rows = extent.logits_rows..extent.logits_rows + extent.state_rows;
                ops.gather_rows(&mut gathered, &hidden, &batch, rows, WIDTH)?;
                ops.states(&gathered, &batch, WIDTH)?;
            }
            Ok(())
        })
        .unwrap();
        ops.results(batch).unwrap()
    };
    for round in 0..3 {
        let first = launch(&[round, 7, 9, 11], &[0, 2], &[0, 3]);
        let second = launch(&[3, 20 + round], &[], &[1]);
        assert_eq!(ops.wait(first).unwrap().states, [row(round), row(11)].concat(), "round {round}");
        let third = launch(&[5; MAX_TOKENS], &[], &(0..MAX_TOKENS as u32).collect::<Vec<_>>());
        assert_eq!(ops.wait(second).unwrap().states, row(20 + round), "round {round}");
        let fourth = launch(&[1, 2], &[0], &[]);
        assert_eq!(ops.wait(third).unwrap().states, row(5).repeat(MAX_TOKENS), "round {round}");
        assert_eq!(ops.wait(fourth).unwrap().states, []);
        // Given up in flight.
        drop(launch(&[4, 4, 4], &[], &[0, 1, 2]));
    }
    ops.synchronize().unwrap();
}
