//! Paragraphs of `Field: value` lines, the form of most of what Debian writes (deb822(5)).
//!
//! An index of packages is 50 MB of it, of which a few fields of a few packages are wanted, so it is read line by
//! line and only what the caller asks for is kept.

use std::io::{self, BufRead, Read};

/// No line of a sound file is longer: the longest in Debian's indices are lists of dependencies of some 20 KB.
const LONGEST_LINE: u64 = 1 << 20;

/// One paragraph: its fields in order. A value of several lines has them separated by `\n`, each trimmed.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Paragraph(Vec<(String, String)>);

impl Paragraph {
    /// The value of the first field of this name; names do not distinguish case.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.0.iter().find(|(field, _)| field.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_str())
    }

    /// The words of a field, or none where it is missing.
    pub fn words(&self, name: &str) -> impl Iterator<Item = &str> {
        self.get(name).unwrap_or_default().split_whitespace()
    }
}

/// Reads paragraphs one after the other.
pub struct Paragraphs<R, K> {
    input: R,
    line: Vec<u8>,
    keep: K,
}

/// All paragraphs of `text`, whole.
pub fn parse(text: &str) -> Vec<Paragraph> {
    // Reading from memory fails only for a line beyond the limit, which ends the list.
    Paragraphs::new(text.as_bytes(), |_| true).map_while(Result::ok).collect()
}

impl<R: BufRead, K: Fn(&str) -> bool> Paragraphs<R, K> {
    /// Reads from `input`; only fields whose name passes `keep` are stored.
    pub fn new(input: R, keep: K) -> Self {
        Self { input, line: Vec::new(), keep }
    }

    /// Reads the next line without its end into `self.line`; `false` at the end of input.
    fn next_line(&mut self) -> io::Result<bool> {
        self.line.clear();
        let read = self.input.by_ref().take(LONGEST_LINE).read_until(b'\n', &mut self.line)?;
        if read as u64 == LONGEST_LINE {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "a line is longer than 1 MiB"));
        }
        while matches!(self.line.last(), Some(b'\n' | b'\r')) {
            self.line.pop();
        }
        Ok(read > 0)
    }
}

impl<R: BufRead, K: Fn(&str) -> bool> Iterator for Paragraphs<R, K> {
    type Item = io::Result<Paragraph>;

    fn next(&mut self) -> Option<Self::Item> {
        let mut paragraph = Paragraph::default();
        let mut empty = true;
        // Whether continuation lines belong to a field that is kept.
        let mut keeping = false;
        loop {
            match self.next_line() {
                Err(error) => return Some(Err(error)),
                Ok(false) => return (!empty).then_some(Ok(paragraph)),
                Ok(true) => {}
            }
            let line = &self.line[..];
            if line.iter().all(u8::is_ascii_whitespace) {
                if empty {
                    continue;
                }
                return Some(Ok(paragraph));
            }
            match line[0] {
                b'#' => {}
                b' ' | b'\t' => {
                    if let Some((_, value)) = paragraph.0.last_mut().filter(|_| keeping) {
                        value.push('\n');
                        value.push_str(String::from_utf8_lossy(line).trim());
                    }
                }
                _ => {
                    empty = false;
                    let colon = line.iter().position(|&byte| byte == b':').unwrap_or(line.len());
                    let name = String::from_utf8_lossy(&line[..colon]);
                    keeping = (self.keep)(name.trim());
                    if keeping {
                        let value = String::from_utf8_lossy(line.get(colon + 1..).unwrap_or_default());
                        paragraph.0.push((name.trim().to_owned(), value.trim().to_owned()));
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comments_continuations_and_blank_lines() {
        let text = "# head\n\n\nTypes: deb\n# between\nURIs: a\n  b\n\tc\nEnabled:no\r\n \n\nTypes: deb-src\nbroken line\n";
        let found = parse(text);
        assert_eq!(found.len(), 2);
        assert_eq!(found[0].get("uris"), Some("a\nb\nc"));
        assert_eq!(found[0].words("URIs").collect::<Vec<_>>(), ["a", "b", "c"]);
        assert_eq!(found[0].get("Enabled"), Some("no"));
        assert_eq!(found[1].get("types"), Some("deb-src"));
        assert_eq!(found[1].get("missing"), None);
    }

    #[test]
    fn only_wanted_fields_are_kept() {
        let text = "Package: a\nDescription: long\n more\nSize: 1\n";
        let only: Vec<_> =
            Paragraphs::new(text.as_bytes(), |name| name != "Description").map(Result::unwrap).collect();
        assert_eq!(only, [Paragraph(vec![("Package".into(), "a".into()), ("Size".into(), "1".into())])]);
    }

    #[test]
    fn an_endless_line_is_an_error_and_not_an_endless_allocation() {
        let mut lines = Paragraphs::new(io::BufReader::new(io::repeat(b'a')), |_| true);
        assert!(lines.next().unwrap().is_err());
    }
}
