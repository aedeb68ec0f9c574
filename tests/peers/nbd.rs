//! A client of the network block device protocol, as far as reading an export needs it.

use std::io::{self, Read, Write};

const OPTION: &[u8; 8] = b"IHAVEOPT";
/// Fixed newstyle, and no 124 zeroes after the export's size: the server's flags and the client's alike.
const FLAGS: u16 = 3;
const READ: u16 = 0;
const DISCONNECT: u16 = 2;

/// An export that was opened.
pub struct Export<S> {
    stream: S,
    pub size: u64,
}

fn number<const N: usize>(stream: &mut impl Read) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    stream.read_exact(&mut bytes)?;
    Ok(bytes)
}

impl<S: Read + Write> Export<S> {
    /// The greeting, then the export of that name.
    #[track_caller]
    pub fn open(mut stream: S, name: &str) -> io::Result<Self> {
        assert_eq!(&number::<8>(&mut stream)?, b"NBDMAGIC");
        assert_eq!(&number::<8>(&mut stream)?, OPTION);
        assert_eq!(u16::from_be_bytes(number(&mut stream)?) & FLAGS, FLAGS);
        let option = 1u32;
        let length = u32::try_from(name.len()).expect("short");
        let flags = u32::from(FLAGS).to_be_bytes();
        let ask = [&flags[..], OPTION, &option.to_be_bytes(), &length.to_be_bytes(), name.as_bytes()].concat();
        stream.write_all(&ask)?;
        let size = u64::from_be_bytes(number(&mut stream)?);
        let _transmission_flags = number::<2>(&mut stream)?;
        Ok(Export { stream, size })
    }

    fn request(&mut self, kind: u16, offset: u64, length: u32) -> io::Result<()> {
        let head = [&0x2560_9513u32.to_be_bytes()[..], &[0; 2], &kind.to_be_bytes(), b"a handle"].concat();
        self.stream.write_all(&[&head[..], &offset.to_be_bytes(), &length.to_be_bytes()].concat())
    }

    #[track_caller]
    pub fn read(&mut self, offset: u64, length: u32) -> io::Result<Vec<u8>> {
        self.request(READ, offset, length)?;
        assert_eq!(u32::from_be_bytes(number(&mut self.stream)?), 0x6744_6698);
        assert_eq!(u32::from_be_bytes(number(&mut self.stream)?), 0, "the server's error");
        assert_eq!(&number::<8>(&mut self.stream)?, b"a handle");
        let mut data = vec![0; length as usize];
        self.stream.read_exact(&mut data)?;
        Ok(data)
    }

    pub fn disconnect(mut self) -> io::Result<()> {
        self.request(DISCONNECT, 0, 0)
    }
}
