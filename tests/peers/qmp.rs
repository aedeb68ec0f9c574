//! A client of QEMU's monitor: one line asks, one line answers.

use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;

pub struct Monitor {
    reader: BufReader<UnixStream>,
    pub greeting: String,
}

impl Monitor {
    /// Reads the greeting; waits until QEMU is ready to give it, or dies.
    pub fn open(stream: UnixStream) -> io::Result<Monitor> {
        let mut monitor = Monitor { reader: BufReader::new(stream), greeting: String::new() };
        monitor.greeting = monitor.line()?;
        Ok(monitor)
    }

    fn line(&mut self) -> io::Result<String> {
        let mut line = String::new();
        match self.reader.read_line(&mut line)? {
            0 => Err(io::ErrorKind::UnexpectedEof.into()),
            _ => Ok(line),
        }
    }

    /// Asks, and skips events until there is an answer.
    pub fn ask(&mut self, command: &str) -> io::Result<String> {
        let text = if command.starts_with('{') { command.to_owned() } else { format!(r#"{{"execute": "{command}"}}"#) };
        // In one write: QEMU answers to the last brace, and after `quit` nobody is there for a line's end.
        self.reader.get_mut().write_all(format!("{text}\n").as_bytes())?;
        loop {
            let line = self.line()?;
            if line.starts_with(r#"{"return""#) || line.starts_with(r#"{"error""#) {
                return Ok(line);
            }
        }
    }
}
