//! The little HTTP that is needed, and what the server has to say.

use crate::board::ANSWER;

/// The longest request, head and body.
pub(crate) const REQUEST: usize = 16 * 1024;

/// What the unread bytes of a connection are.
pub(crate) enum Parsed {
    /// The beginning of a request.
    Partial,
    Request {
        /// Head and body.
        length: usize,
        path: String,
        keep_alive: bool,
    },
    /// Answered by an error and the end of the connection, whatever follows.
    Bad(&'static str),
}

pub(crate) fn parse(bytes: &[u8]) -> Parsed {
    let mut headers = [httparse::EMPTY_HEADER; 64];
    let mut request = httparse::Request::new(&mut headers);
    let head = match request.parse(bytes) {
        Ok(httparse::Status::Complete(head)) => head,
        Ok(httparse::Status::Partial) if bytes.len() < REQUEST => return Parsed::Partial,
        Ok(httparse::Status::Partial) => return Parsed::Bad("431 Request Header Fields Too Large"),
        Err(_) => return Parsed::Bad("400 Bad Request"),
    };
    let header = |name: &str| {
        let found = request.headers.iter().find(|h| h.name.eq_ignore_ascii_case(name));
        found.map(|h| String::from_utf8_lossy(h.value).trim().to_ascii_lowercase())
    };
    if !matches!(request.method, Some("GET" | "POST")) {
        return Parsed::Bad("501 Not Implemented");
    }
    if header("transfer-encoding").is_some() {
        return Parsed::Bad("411 Length Required");
    }
    let body = match header("content-length").map(|n| n.parse::<usize>()) {
        None => 0,
        Some(Ok(n)) if n <= REQUEST - head => n,
        Some(Ok(_)) => return Parsed::Bad("413 Content Too Large"),
        Some(Err(_)) => return Parsed::Bad("400 Bad Request"),
    };
    if bytes.len() < head + body {
        return Parsed::Partial;
    }
    let keep_alive = match header("connection") {
        Some(said) => said != "close" && (said == "keep-alive" || request.version == Some(1)),
        None => request.version == Some(1),
    };
    Parsed::Request { length: head + body, path: request.path.unwrap_or_default().to_owned(), keep_alive }
}

/// What this server does: says what it was asked, and who answers. With `?bytes=N` the body has that length.
pub(crate) fn answer(path: &str) -> String {
    let mut body = format!("{path} by worker {}\n", std::process::id());
    let wanted = path.split_once("?bytes=").and_then(|(_, n)| n.parse().ok());
    // Room for the head.
    let longest = ANSWER - 200;
    body.truncate(body.floor_char_boundary(longest));
    body.extend(std::iter::repeat_n('.', wanted.unwrap_or(0).min(longest).saturating_sub(body.len())));
    body
}

pub(crate) fn response(status: &str, body: &str, keep_alive: bool) -> Vec<u8> {
    let connection = if keep_alive { "keep-alive" } else { "close" };
    let length = body.len();
    let mut all = format!("HTTP/1.1 {status}\r\nContent-Length: {length}\r\nConnection: {connection}\r\n\r\n");
    all.push_str(body);
    all.into_bytes()
}
