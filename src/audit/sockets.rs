//! The kernel's tables of sockets (`/proc/PID/net`), read when first asked for.

use super::Kind;
use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// What a socket is, and its addresses, if it has any.
type Listed = (Kind, Option<String>);

/// By inode, Unix sockets apart: the kernel writes their paths as they are, so one with a newline in it makes a line of its own.
pub(super) struct Sockets {
    /// `None` within: several lines say different things, one of which may be a path.
    found: Option<HashMap<(u64, bool), Option<Listed>>>,
}

const TABLES: [&str; 8] = ["tcp", "tcp6", "udp", "udp6", "udplite", "udplite6", "unix", "netlink"];

impl Sockets {
    pub(super) fn new() -> Self {
        Sockets { found: None }
    }

    /// `read` gives the text of a table, empty if there is none.
    pub(super) fn find(&mut self, inode: u64, is_unix: bool, read: impl Fn(&str) -> String) -> Option<Listed> {
        let found = self.found.get_or_insert_with(|| {
            let mut found: HashMap<_, Option<Listed>> = HashMap::new();
            for table in TABLES {
                let text = read(table);
                // The first line is the heading.
                for line in text.lines().skip(1) {
                    let entry = match table {
                        "unix" => unix(line),
                        "netlink" => netlink(line),
                        _ => internet(line, table.starts_with("tcp")),
                    };
                    let Some((inode, listed)) = entry else { continue };
                    found
                        .entry((inode, table == "unix"))
                        .and_modify(|known| *known = known.take().filter(|known| *known == listed))
                        .or_insert(Some(listed));
                }
            }
            found
        });
        found.get(&(inode, is_unix)).cloned().flatten()
    }
}

type Entry = (u64, Listed);

/// `sl local_address rem_address st tx:rx tr:when retrnsmt uid timeout inode ...`
fn internet(line: &str, tcp: bool) -> Option<Entry> {
    let columns: Vec<&str> = line.split_whitespace().collect();
    let [_, local, remote, state, _, _, _, _, _, inode, ..] = columns[..] else { return None };
    let (local, remote) = (address(local)?, address(remote)?);
    let kind = match (tcp, state) {
        (true, "0A") => Kind::TcpListener,
        (true, _) => Kind::Tcp,
        (false, _) => Kind::Udp,
    };
    let connected = remote.port() != 0;
    let text = match tcp_state(state) {
        _ if !connected => local.to_string(),
        Some(state) if tcp => format!("{local} -> {remote} {state}"),
        _ => format!("{local} -> {remote}"),
    };
    Some((inode.parse().ok()?, (kind, Some(text))))
}

/// What is worth saying: not that a connection is established.
fn tcp_state(state: &str) -> Option<&'static str> {
    Some(match state {
        "02" => "syn-sent",
        "03" | "0C" => "syn-recv",
        "04" => "fin-wait-1",
        "05" => "fin-wait-2",
        "06" => "time-wait",
        "07" => "closed",
        "08" => "close-wait",
        "09" => "last-ack",
        "0B" => "closing",
        _ => return None,
    })
}

/// `0100007F:0050`: 32-bit words of the address in the machine's own order, then the port.
fn address(text: &str) -> Option<SocketAddr> {
    let (ip, port) = text.split_once(':')?;
    let word = |at: usize| Some(u32::from_str_radix(ip.get(at * 8..at * 8 + 8)?, 16).ok()?.to_ne_bytes());
    let ip: IpAddr = match ip.len() {
        8 => Ipv4Addr::from(word(0)?).into(),
        32 => {
            let mut octets = [0; 16];
            for (i, part) in octets.chunks_exact_mut(4).enumerate() {
                part.copy_from_slice(&word(i)?);
            }
            Ipv6Addr::from(octets).into()
        }
        _ => return None,
    };
    Some(SocketAddr::new(ip, u16::from_str_radix(port, 16).ok()?))
}

/// `Num RefCount Protocol Flags Type St Inode Path`; the path may hold anything.
fn unix(line: &str) -> Option<Entry> {
    const LISTENS: u32 = 1 << 16;
    let mut rest = line;
    let mut column = || {
        let (column, after) = rest.trim_start().split_once(' ').unwrap_or((rest.trim_start(), ""));
        rest = after;
        column
    };
    let [_, _, _, flags, kind, _, inode] = std::array::from_fn(|_| column());
    let listens = u32::from_str_radix(flags, 16).ok()? & LISTENS != 0;
    let kind = unix_kind(i32::from_str_radix(kind, 16).ok()?, listens);
    Some((inode.parse().ok()?, (kind, (!rest.is_empty()).then(|| rest.to_owned()))))
}

pub(super) fn unix_kind(kind: i32, listens: bool) -> Kind {
    match kind {
        _ if listens => Kind::UnixListener,
        libc::SOCK_STREAM => Kind::UnixStream,
        libc::SOCK_DGRAM => Kind::UnixDatagram,
        libc::SOCK_SEQPACKET => Kind::UnixSeqpacket,
        _ => Kind::Socket,
    }
}

/// `sk Eth Pid Groups Rmem Wmem Dump Locks Drops Inode`
fn netlink(line: &str) -> Option<Entry> {
    let columns: Vec<&str> = line.split_whitespace().collect();
    let [_, protocol, port, .., inode] = columns[..] else { return None };
    Some((inode.parse().ok()?, (Kind::Netlink, Some(format!("protocol {protocol} port {port}")))))
}

/// For a socket that no table has. Where it is not known whether it listens, it may, in another network namespace.
pub(super) fn kind_of_protocol(name: &str, listens: Option<bool>) -> Kind {
    match (name, listens) {
        ("TCP" | "TCPv6", Some(true)) => Kind::TcpListener,
        ("TCP" | "TCPv6", Some(false)) => Kind::Tcp,
        ("UDP" | "UDPv6" | "UDP-Lite" | "UDPLITEv6", _) => Kind::Udp,
        ("NETLINK", _) => Kind::Netlink,
        _ => Kind::Socket,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg(target_endian = "little")]
    fn addresses_are_read_as_the_kernel_writes_them() {
        let four = "   0: 0100007F:07E8 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1564 1 0 100 0 0 10 0";
        assert_eq!(internet(four, true), Some((1564, (Kind::TcpListener, Some("127.0.0.1:2024".to_owned())))));
        let six = "   1: 00000000000000000000000001000000:DD34 B80D0120000000000000000001000000:01BB 08 0:0 0:0 0     0        0 77 2 0";
        assert_eq!(
            internet(six, true),
            Some((77, (Kind::Tcp, Some("[::1]:56628 -> [2001:db8::1]:443 close-wait".to_owned()))))
        );
        assert_eq!(internet("nonsense", true), None);
        assert_eq!(address("01:0050"), None);
        assert_eq!(address("é000007F:0050"), None);
    }

    #[test]
    fn a_path_may_hold_anything() {
        let line = "0000000022ffb89a: 00000002 00000000 00010000 0005 01 14689568 /tmp/a path  with 7 spaces";
        let path = "/tmp/a path  with 7 spaces".to_owned();
        assert_eq!(unix(line), Some((14689568, (Kind::UnixListener, Some(path)))));
        let unnamed = "0000000021ff76b6: 00000003 00000000 00000000 0002 03   131";
        assert_eq!(unix(unnamed), Some((131, (Kind::UnixDatagram, None))));
        assert_eq!(unix(""), None);
    }
}
