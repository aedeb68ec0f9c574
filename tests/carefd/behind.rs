//! Numbers closed or replaced behind the library's back (F6).

use crate::common::isolated;
use crate::kit::captured;
use crate::{care, close, is_open};
use carefork::CareFd;
use std::fs::File;
use std::io;
use std::net::UdpSocket;
use std::os::fd::AsRawFd;

#[test]
fn a_number_closed_behind_is_reported_and_not_closed_twice() {
    isolated("behind::a_number_closed_behind_is_reported_and_not_closed_twice", 20, || {
        let file = care();
        let fd = file.as_raw_fd();
        close(fd);
        // Before std's own abort.
        let said = captured(2, || drop(file));
        assert!(said.starts_with("carefork: ") && said.contains(&format!("care-fd {fd} ")), "{said}");
        assert_eq!(said.lines().count(), 1, "{said}");
        assert!(captured(2, || drop(care())).is_empty());
    });
}

#[test]
fn a_number_taken_by_a_stranger_is_left_to_him() {
    isolated("behind::a_number_taken_by_a_stranger_is_left_to_him", 20, || {
        let file = care();
        let fd = file.as_raw_fd();
        close(fd);
        let stranger = File::open("/dev/zero").expect("open");
        assert_eq!(stranger.as_raw_fd(), fd);
        let said = captured(2, || drop(file));
        assert!(said.contains(&format!("care-fd {fd} was replaced")), "{said}");
        assert!(is_open(fd));
    });
}

#[test]
fn a_number_taken_by_a_care_fd_is_left_to_it() {
    isolated("behind::a_number_taken_by_a_care_fd_is_left_to_it", 20, || {
        let file = care();
        let fd = file.as_raw_fd();
        let mut newer = None;
        let said = captured(2, || {
            close(fd);
            newer = Some(care());
        });
        assert!(said.contains(&format!("care-fd {fd} was closed")), "{said}");
        let newer = newer.expect("opened");
        assert_eq!(newer.as_raw_fd(), fd);
        assert!(file.get().is_none());
        drop(file);
        assert!(is_open(fd) && newer.is_open_here());
    });
}

#[test]
fn what_changes_about_a_file_is_no_replacement() {
    isolated("behind::what_changes_about_a_file_is_no_replacement", 20, || {
        let said = captured(2, || {
            let path = std::env::temp_dir().join(format!("carefork-{}", std::process::id()));
            let file = CareFd::open(|| File::create(&path)).expect("a file");
            file.set_len(4096).expect("longer");
            std::fs::remove_file(&path).expect("unlinked");
            let socket = CareFd::open(|| UdpSocket::bind("127.0.0.1:0")).expect("a socket");
            socket.connect("127.0.0.1:9").expect("connected");
            let (read, write) = CareFd::open_pair(io::pipe).expect("a pipe");
            drop(write);
            drop((file, socket, read));
        });
        assert_eq!(said, "");
    });
}
