//! The bits of a result depend on its prompt alone.

use crate::rig::{MODELS, engine, goldens, pending, result};

#[test]
fn company_changes_no_bit() {
    for name in MODELS {
        let engine = engine(name);
        let (handle, goldens) = (engine.handle(), goldens(name));
        let alone: Vec<Vec<f32>> = goldens.iter().map(|golden| result(&handle, golden)).collect();
        // More than one step holds, so some wait for room for all of their tokens.
        let together: Vec<_> = (0..12).map(|i| pending(&handle, &goldens[i * 5 % 3])).collect();
        for (i, pending) in together.into_iter().enumerate() {
            let bits = |values: &[f32]| values.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
            assert_eq!(bits(&pending()), bits(&alone[i * 5 % 3]), "{name}, prompt {}", i * 5 % 3);
        }
        let stats = handle.stats();
        assert_eq!(stats.kv_blocks.owned, 0, "{name}");
        if handle.info().is_bidirectional {
            assert_eq!(stats.kv_blocks.cached, 0, "{name}: nobody can use what owes to all of a prompt");
        }
    }
}
