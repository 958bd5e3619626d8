//! Each faulty kernel is found, and says what and where.
//!
//! Built with a sanitizer (scripts/sanitize-kernels), the emulator's own race check is off, and memory errors end the process;
//! tests that need one or the other say so.

use tidemill_kernels_emu::Schedule;

use crate::harness::call;

/// The emulator's own race check is compiled in.
const OWN_RACE_CHECK: bool = option_env!("TIDEMILL_EMU_SANITIZE").is_none();

#[test]
fn missing_barriers_are_races() {
    if !OWN_RACE_CHECK {
        return;
    }
    for name in
        ["no_barrier", "no_barrier_before_reuse", "no_syncwarp", "shuffle_as_fence", "wrong_named_barrier"]
    {
        call(name).complains("race on shared variable s");
    }
    call("not_atomic").complains("race on shared variable s");
    for name in ["copy_without_barrier", "copy_into_a_buffer_in_use"] {
        call(name).complains("race on shared variable s");
    }
}

#[test]
fn a_race_names_both_places_and_both_threads() {
    if !OWN_RACE_CHECK {
        return;
    }
    let complaint = call("no_barrier").run(Schedule::default()).unwrap_err();
    // A thread that runs first reads what one that runs later writes.
    assert!(complaint.contains(" writes it, thread (") && complaint.contains(" has read it"), "{complaint}");
    assert!(complaint.contains("now:    ordering.cu:7\n  before: ordering.cu:8"), "{complaint}");
}

#[test]
fn divergent_barriers_name_both_places() {
    call("divergent_barrier").complains("divergent __syncthreads: this thread is at");
    call("early_return").complains("have already returned");
    call("conditional_barrier").complains("have already returned");
    call("named_barrier_counts_differ").complains("others came with");
}

#[test]
fn a_deadlock_says_who_waits_where() {
    call("named_barrier_of_too_many").complains("in named barrier (64 of 128 arrived)");
    for name in ["masks_differ", "divergent_shuffle"] {
        stuck(name);
    }
}

#[test]
fn collectives_check_their_lanes() {
    call("not_in_own_mask").complains("is not in its own mask 0000ffff");
    call("operations_differ").complains("divergent warp collective");
    stuck("lane_returned");
}

/// Requires that it is found that lanes wait for others that never come.
#[track_caller]
fn stuck(name: &'static str) {
    for result in call(name).run_all() {
        let complaint = result.unwrap_err();
        let returned = complaint.contains("have already returned");
        // Whether those have gone before the first comes to wait depends on the schedule.
        assert!(returned || complaint.contains("deadlock: no thread can run"), "{complaint}");
    }
}

#[test]
fn uninitialised_shared_memory_is_all_ones() {
    for result in call("uninitialised_shared").run_all() {
        let values = result.unwrap();
        assert!(values[..200].iter().all(|&v| v != -1) && values[200..].iter().all(|&v| v == -1));
    }
}

#[test]
fn overruns_of_shared_memory_are_found_after_the_block() {
    if option_env!("TIDEMILL_EMU_SANITIZE") == Some("address") {
        return; // it ends the process at the first byte
    }
    let mut overrun = call("static_shared_overrun");
    overrun.n = 1;
    overrun.complains("write beyond the end of shared variable s");
    let mut overrun = call("dynamic_shared_overrun");
    (overrun.n, overrun.shared_bytes) = (1, 1024);
    overrun.complains("write beyond the end of dynamic shared memory");
}

#[test]
fn overruns_of_global_memory_fault_at_the_first_byte() {
    if option_env!("TIDEMILL_EMU_SANITIZE").is_some() {
        return; // the sanitizers have fault handlers of their own
    }
    for name in ["global_read_overrun", "global_write_overrun"] {
        let mut overrun = call(name);
        overrun.n = 1;
        overrun.complains("invalid memory access at address");
    }
}

#[test]
fn an_overrun_too_small_for_the_guard_page_is_found_when_the_memory_is_freed() {
    let mut overrun = call("global_write_overrun");
    (overrun.n, overrun.outputs, overrun.block) = (1, 254, 254);
    overrun.complains("bytes beyond the end of \"out\" (1016 bytes) were overwritten");
}

#[test]
fn too_much_static_shared_memory_is_refused() {
    call("too_much_static_shared").complains("shared memory exhausted: s (53248 bytes)");
}

#[test]
fn misaligned_vector_accesses_are_refused() {
    call("misaligned_copy").complains("misaligned address");
    for (name, words) in [
        ("misaligned_matrix", "ldmatrix row is not 16-byte aligned"),
        ("misaligned_load", "misaligned address"),
    ] {
        let mut misaligned = call(name);
        misaligned.shared_bytes = 1024;
        misaligned.complains(words);
    }
    call("copy_to_a_register").complains("is not in shared memory");
}

#[test]
fn data_of_a_copy_that_was_not_waited_for_is_not_there() {
    for name in ["copy_not_waited_for", "copy_waits_for_too_few"] {
        let right: Vec<i32> = call(name).input;
        let caught = call(name).run_all().into_iter().any(|result| result.as_ref() != Ok(&right));
        assert!(caught, "{name}");
    }
    let forgotten = call("copy_never_waited_for").run_all();
    assert!(forgotten.iter().flatten().count() <= 1, "only where copies take effect at once");
    assert!(forgotten[1].as_ref().unwrap_err().contains("cp.async that it has not waited for"));
}

/// For scripts/sanitize-kernels, which requires that ThreadSanitizer ends the process.
#[test]
#[ignore = "run by scripts/sanitize-kernels, where a sanitizer must end the process"]
fn a_race_between_threads_for_the_sanitizer() {
    call("no_barrier").run_all();
}

/// As above. Not a race that the emulator's own check looks for.
#[test]
#[ignore = "run by scripts/sanitize-kernels, where a sanitizer must end the process"]
fn a_race_between_blocks_for_the_sanitizer() {
    let mut race = call("global_race");
    race.grid = 8;
    race.run_all();
}

/// As above, for AddressSanitizer.
#[test]
#[ignore = "run by scripts/sanitize-kernels, where a sanitizer must end the process"]
fn an_overrun_for_the_sanitizer() {
    let mut overrun = call("static_shared_overrun");
    overrun.n = 1;
    overrun.run_all();
}
