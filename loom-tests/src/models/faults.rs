//! The models can fail: each of these one-line deviations from the protocols is caught by some model.
//!
//! They are compiled in under loom (`sync::fault`) and chosen by `CAREFORK_FAULT`, each in a process of its own, because a
//! deadlock that loom finds may end the process.

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// The deviation, and the model that must catch it.
const FAULTS: &[(&str, &str)] = &[
    ("enter_no_fence", "regions::two_regions_and_a_forker"),
    ("shut_no_fence", "regions::two_regions_and_a_forker"),
    ("no_nudge", "regions::two_regions_and_a_forker"),
    ("reopen_no_wake", "regions::two_regions_and_a_forker"),
    ("enter_relaxed", "regions::two_regions_and_a_forker"),
    // Where no fence follows: loom takes a store and a fence after it for one step.
    ("leave_relaxed", "regions::without_membarrier"),
    ("enter_no_recheck", "regions::coming_in_late"),
    ("goes_last", "regions::a_region_that_waits_for_an_awaited_one"),
    ("drained_in_one_look", "regions::an_awaited_one_and_a_region"),
    ("goes_silently", "regions::an_awaited_one_waits_for_another"),
    ("asks_once", "regions::an_awaited_one_comes_in_late"),
    ("courteous_no_wake", "regions::regions_between_two_forks"),
    ("role_relaxed", "forkers::the_role_alone"),
    ("holder_not_first", "forkers::the_holder_forks_first"),
    ("asked_once", "forkers::asked_before_it_sleeps"),
    ("stale_wait_believed", "words::a_wait_that_has_just_ended"),
    ("turn_no_wake", "forkers::two_forkers_and_a_region"),
    ("reset_keeps_words", "regions::the_child_goes_on_after_another_forker"),
    ("hook_unmarked", "hooks::unregister_during_a_fork"),
    ("progress_late", "hooks::unregister_during_a_fork"),
    ("fell_no_wake", "hooks::unregister_during_a_fork"),
    ("left_no_wake", "hooks::unregister_during_a_fork"),
    ("closed_before_unregistered", "care::the_child_of_a_dirty_fork"),
    ("registered_unmarked", "care::registered_during_a_dirty_fork"),
    ("slept_without_bit", "words::a_bit_for_the_second_sleeper"),
    ("unlock_relaxed", "words::three_lockers"),
    ("timed_out_keeps_wake_up", "words::a_timed_out_locker_passes_the_wake_up_on"),
    ("write_relaxed", "words::a_writer_and_two_readers"),
    ("read_relaxed", "words::a_writer_and_two_readers"),
    ("readers_not_woken", "words::a_writer_and_two_readers"),
    ("woken_writer_without_bit", "words::three_writers_and_a_reader"),
    ("timed_out_lets_nobody_in", "words::a_timed_out_writer_lets_readers_in"),
    ("upgrader_not_woken", "words::upgraders_and_a_reader"),
    ("condvar_looks_late", "condvars::a_waiter_and_a_notifier"),
    ("condvar_stands", "condvars::a_waiter_and_a_notifier"),
    ("condvar_one_takes_bit", "condvars::two_waiters_and_one_notifier"),
    ("condvar_unused_bit_off", "condvars::two_waiters_and_one_notifier"),
    ("condvar_timeout_eats", "condvars::a_timed_out_waiter_takes_no_wake_up"),
    ("loosened_late", "clocked::reopened_by_one_entered_by_another"),
    ("late_too_late", "clocked::reopened_by_one_entered_by_another"),
];

/// Far more than a model takes on whatever machine; a hang is no catch.
const PATIENCE: Duration = Duration::from_secs(900);

/// Whether the model passes with that deviation.
fn passes(fault: &str, model: &str) -> bool {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", &format!("models::{model}"), "--test-threads=1"])
        .env("CAREFORK_FAULT", fault)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let end = Instant::now() + PATIENCE;
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return status.success();
        }
        if Instant::now() > end {
            child.kill().unwrap();
            child.wait().unwrap();
            panic!("{model} hangs with {fault}");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn seeded_faults_are_caught() {
    let mut missed = Vec::new();
    for (fault, model) in FAULTS {
        let begun = Instant::now();
        let caught = !passes(fault, model);
        println!(
            "{fault}: {model} {} ({:?})",
            if caught { "catches it" } else { "does not catch it" },
            begun.elapsed()
        );
        if !caught {
            missed.push((fault, model));
        }
    }
    assert!(missed.is_empty(), "{missed:?}");
}
