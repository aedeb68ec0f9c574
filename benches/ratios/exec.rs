//! Programs: /bin/true started and waited for, in processes of all sizes.

use crate::forks::Server;
use crate::measure::{median, row, turns};
use std::os::fd::{FromRawFd, OwnedFd};
use std::time::Instant;

const STARTS: usize = 20;
const MIB: usize = 1 << 20;

fn ours() {
    assert!(carefork::Command::new("/bin/true").status().unwrap().success());
}

fn std() {
    assert!(std::process::Command::new("/bin/true").status().unwrap().success());
}

fn std_with_closure() {
    use std::os::unix::process::CommandExt;
    let mut command = std::process::Command::new("/bin/true");
    assert!(unsafe { command.pre_exec(|| Ok(())) }.status().unwrap().success());
}

/// What a C program would do.
fn bare() {
    unsafe extern "C" {
        static environ: *const *mut libc::c_char;
    }
    unsafe {
        let mut pid = 0;
        let argv = [c"/bin/true".as_ptr().cast_mut(), std::ptr::null_mut()];
        let none = std::ptr::null();
        assert_eq!(libc::posix_spawn(&mut pid, c"/bin/true".as_ptr(), none, none.cast(), argv.as_ptr(), environ), 0);
        let mut status = 0;
        assert_eq!(libc::waitpid(pid, &mut status, 0), pid);
        assert_eq!(status, 0);
    }
}

fn time(f: impl Fn()) -> f64 {
    let each = || {
        let t = Instant::now();
        f();
        t.elapsed().as_nanos() as f64
    };
    median((0..STARTS).map(|_| each()).collect())
}

/// Memory in small pages, each of them written to.
fn resident(bytes: usize) {
    unsafe {
        let (read_write, kind) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        let p = libc::mmap(std::ptr::null_mut(), bytes, read_write, kind, -1, 0);
        assert_ne!(p, libc::MAP_FAILED);
        libc::madvise(p, bytes, libc::MADV_NOHUGEPAGE);
        for at in (0..bytes).step_by(4096) {
            p.cast::<u8>().add(at).write_volatile(1);
        }
    }
}

/// The process at the other end: `setup` once, then a line in, a number out.
pub(crate) fn serve() {
    let setup = std::env::args().nth(2).unwrap();
    let mut fds: Vec<OwnedFd> = Vec::new();
    match setup.split_once(':').unwrap() {
        ("MiB", n) => resident(n.parse::<usize>().unwrap() * MIB),
        (_, n) => {
            let n: u64 = n.parse().unwrap();
            let limit = libc::rlimit { rlim_cur: n + 100, rlim_max: n + 100 };
            assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &limit) }, 0);
            let open = || unsafe { OwnedFd::from_raw_fd(libc::fcntl(0, libc::F_DUPFD_CLOEXEC, 3)) };
            fds.extend((0..n).map(|_| open()));
        }
    }
    for line in std::io::stdin().lines() {
        let x = match line.unwrap().as_str() {
            "ours" => time(ours),
            "std" => time(std),
            "bare" => time(bare),
            "closure" => time(std_with_closure),
            other => panic!("{other}"),
        };
        println!("{x}");
    }
    drop(fds);
}

pub(crate) fn rows(wanted: &dyn Fn(&str) -> bool) {
    let pair = |what: &str, ours: (&str, &str), rival: (&str, &str), limit: f64| {
        if !wanted(what) {
            return;
        }
        let mut a = Server::start_as("serve-exec", false, ours.0);
        // One process for both where both are in the same state: two have their memory in different places.
        let mut b = (ours.0 != rival.0).then(|| Server::start_as("serve-exec", false, rival.0));
        let r = match &mut b {
            Some(b) => turns(41, || a.ask(ours.1) / 1000.0, || b.ask(rival.1) / 1000.0),
            None => {
                let a = std::cell::RefCell::new(a);
                turns(41, || a.borrow_mut().ask(ours.1) / 1000.0, || a.borrow_mut().ask(rival.1) / 1000.0)
            }
        };
        row(what, r, "µs", limit);
    };
    pair("program started and waited for, against bare posix_spawn", ("MiB:10", "ours"), ("MiB:10", "bare"), 1.05);
    pair("program started and waited for, against std's Command", ("MiB:10", "ours"), ("MiB:10", "std"), 1.03);
    pair("program with 1 GiB resident, against 10 MiB", ("MiB:1024", "ours"), ("MiB:10", "ours"), 1.15);
    pair("program with 4 GiB resident, against 10 MiB", ("MiB:4096", "ours"), ("MiB:10", "ours"), 1.15);
    pair("program with 10 000 descriptors, against std's Command", ("fds:10000", "ours"), ("fds:10000", "std"), 1.1);
    // Not a limit but the reason: what std does as soon as there is a closure.
    pair("program with 1 GiB resident, against std's pre_exec", ("MiB:1024", "ours"), ("MiB:1024", "closure"), 1.0);
}
