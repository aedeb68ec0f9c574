//! What a builder is told, the logger does.

use crate::common::{self, isolated, isolated_with};
use crate::logs::Scratch;
use crate::{log_by, numbered};
use ::log::{Level, LevelFilter, Log, Record};
use carefork::log::{Builder, Output};

/// Which records of level and target a logger that is built like this writes.
fn writes(builder: Builder, records: &[(Level, &str)]) -> Vec<bool> {
    let file = Scratch::new("settings");
    let logger = builder.output(Output::file(&file.0).expect("a file")).build();
    let written = |&(level, target): &(Level, &str)| {
        let before = file.text().len();
        logger.log(&Record::builder().level(level).target(target).args(format_args!("said")).build());
        file.text().len() > before
    };
    records.iter().map(written).collect()
}

#[test]
fn levels() {
    let records = [
        (Level::Info, "app"),
        (Level::Debug, "app"),
        (Level::Warn, "app"),
        (Level::Debug, "net"),
        (Level::Debug, "net::http"),
        (Level::Trace, "net"),
    ];
    let found = |builder| writes(builder, &records).into_iter().map(u8::from).collect::<Vec<_>>();
    assert_eq!(found(Builder::new()), [1, 0, 1, 0, 0, 0]);
    assert_eq!(found(Builder::new().level(LevelFilter::Warn)), [0, 0, 1, 0, 0, 0]);
    assert_eq!(found(Builder::new().level(LevelFilter::Trace)), [1; 6]);
    let builder = || Builder::new().target_level("net", LevelFilter::Debug);
    assert_eq!(found(builder()), [1, 0, 1, 1, 1, 0]);
    assert_eq!(found(builder().level(LevelFilter::Off)), [0, 0, 0, 1, 1, 0]);
}

#[test]
fn the_facade_gets_the_level() {
    isolated("settings::the_facade_gets_the_level", 60, || {
        assert_eq!(::log::max_level(), LevelFilter::Off);
        let builder = Builder::new().level(LevelFilter::Warn).target_level("net", LevelFilter::Debug);
        let logger = builder.init().expect("the first logger");
        assert_eq!((::log::max_level(), logger.max_level()), (LevelFilter::Debug, LevelFilter::Debug));
        assert!(Builder::new().level(LevelFilter::Trace).init().is_err());
        assert_eq!(::log::max_level(), LevelFilter::Debug, "one that was not installed changes nothing");
    });
}

#[test]
fn utc() {
    let mut setup = common::Setup::default();
    setup.env.push(("TZ".into(), "Asia/Kathmandu".into()));
    isolated_with("settings::utc", 60, setup, || {
        for (utc, zone) in [(true, "+00:00 "), (false, "+05:45 ")] {
            let file = Scratch::new("utc");
            let logger = Builder::new().utc(utc).output(Output::file(&file.0).expect("a file")).build();
            let before = jiff::Timestamp::now() - std::time::Duration::from_micros(1);
            log_by(&logger, "record 0 0");
            let (text, now) = (file.text(), jiff::Timestamp::now());
            let stamp = text.split(' ').next().expect("split finds one");
            assert_eq!((text.find(zone), numbered(&text)), (Some(stamp.len() - zone.len() + 1), vec![0]), "{text}");
            assert!((before..=now).contains(&stamp.parse().expect("a time")), "{text}");
        }
    });
}

/// The program's signals are handled by its own threads.
#[test]
fn the_background_thread_blocks_all_signals() {
    isolated("settings::the_background_thread_blocks_all_signals", 60, || {
        let blocked = |task: &str| {
            let status = std::fs::read_to_string(format!("/proc/{task}/status")).expect("/proc");
            let word = |name: &str| Some(status.lines().find_map(|line| line.strip_prefix(name))?.trim().to_owned());
            let mask = word("SigBlk:").expect("a mask");
            (word("Name:").expect("a name"), u64::from_str_radix(&mask, 16).expect("a mask"))
        };
        let (_, before) = blocked("thread-self");
        let file = Scratch::new("signals");
        let logger = Builder::new().output(Output::file(&file.0).expect("a file")).background(8).build();
        log_by(&logger, "record 0 0");
        logger.flush();
        assert_eq!(blocked("thread-self").1, before, "the thread that logged has its own mask");
        let tasks = std::fs::read_dir("/proc/self/task").expect("/proc");
        let tasks = tasks.map(|task| blocked(&format!("self/task/{}", task.expect("/proc").file_name().display())));
        let masks: Vec<u64> = tasks.filter(|(name, _)| name == "carefork-log").map(|(_, mask)| mask).collect();
        // Two that cannot be, three that libc keeps for itself.
        let others = [libc::SIGKILL, libc::SIGSTOP, 32, 33, 34].iter().fold(0, |all, n| all | 1u64 << (n - 1));
        assert_eq!(masks.iter().map(|mask| mask | others).collect::<Vec<_>>(), [u64::MAX]);
    });
}
