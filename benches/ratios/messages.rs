//! Descriptors over a Unix socket: send, receive and close, against the same by bare nix calls.

use crate::measure::{cpu, row, turns};
use carefork::{recv_fds, send_fds};
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;

pub(crate) fn rows(wanted: &dyn Fn(&str) -> bool) {
    let (here, there) = UnixStream::pair().unwrap();
    let null = std::fs::File::open("/dev/null").unwrap();
    for (count, n) in [(1, 20_000), (253, 400)] {
        let what = format!("SCM_RIGHTS send+receive of {count}, against bare nix calls");
        if !wanted(&what) {
            continue;
        }
        let fds: Vec<BorrowedFd<'_>> = vec![null.as_fd(); count];
        let numbers: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        let mut control = vec![0u8; 2048];
        let ours = || {
            per_call(n, || {
                send_fds(&here, b"x", &fds).unwrap();
                let message = recv_fds(&there, &mut [0; 8], count).unwrap();
                assert_eq!(message.fds.len(), count);
            })
        };
        let bare = || {
            per_call(n, || {
                let rights = [ControlMessage::ScmRights(&numbers)];
                let part = [IoSlice::new(b"x")];
                sendmsg::<()>(here.as_raw_fd(), &part, &rights, MsgFlags::MSG_NOSIGNAL, None).unwrap();
                let mut text = [0; 8];
                let mut parts = [IoSliceMut::new(&mut text)];
                let flags = MsgFlags::MSG_CMSG_CLOEXEC;
                let message = recvmsg::<()>(there.as_raw_fd(), &mut parts, Some(&mut control), flags).unwrap();
                let mut got = Vec::new();
                for control in message.cmsgs().unwrap() {
                    if let ControlMessageOwned::ScmRights(fds) = control {
                        got.extend(fds.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
                    }
                }
                assert_eq!(got.len(), count);
            })
        };
        row(&what, turns(41, ours, bare), "ns CPU", 1.1);
    }
}

fn per_call(n: u32, mut f: impl FnMut()) -> f64 {
    let start = cpu();
    (0..n).for_each(|_| f());
    (cpu() - start) as f64 / f64::from(n)
}
