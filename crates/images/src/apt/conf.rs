//! Settings of apt.conf (apt.conf(5)), as far as they concern fetching: names with their values, in order.

use std::path::Path;

use super::sources::truth;

/// Settings: full name in lower case, such as `acquire::http::proxy`, and value. A later one overrides an earlier.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct AptConf(Vec<(String, String)>);

impl AptConf {
    /// Reads `etc/apt/apt.conf.d/*` and `etc/apt/apt.conf` under `root`, in the order in which apt does.
    pub fn load(root: &Path) -> Self {
        let mut conf = Self::default();
        let mut paths = super::parts(&root.join("etc/apt/apt.conf.d"), &["", "conf"]);
        paths.push(root.join("etc/apt/apt.conf"));
        for path in paths {
            conf.parse(&std::fs::read_to_string(path).unwrap_or_default());
        }
        conf
    }

    /// The value of a setting; names do not distinguish case.
    pub fn get(&self, name: &str) -> Option<&str> {
        let name = name.to_ascii_lowercase();
        self.0.iter().rev().find(|(key, _)| *key == name).map(|(_, value)| value.as_str())
    }

    /// A setting that is yes or no.
    pub fn flag(&self, name: &str) -> Option<bool> {
        self.get(name).and_then(truth)
    }

    /// Adds the settings of one file's `text`. What is malformed is skipped up to the next `;`, `{` or `}`.
    pub fn parse(&mut self, text: &str) {
        let mut scopes: Vec<String> = Vec::new();
        let mut words: Vec<String> = Vec::new();
        for token in tokens(text) {
            match token {
                Token::Word(word) => words.push(word),
                Token::Open => {
                    scopes.push(words.first().cloned().unwrap_or_default());
                    words.clear();
                }
                Token::Close => {
                    scopes.pop();
                    words.clear();
                }
                Token::End => {
                    self.set(&scopes, &words);
                    words.clear();
                }
            }
        }
    }

    fn set(&mut self, scopes: &[String], words: &[String]) {
        let (name, value) = match words {
            [name, value, ..] => (name.as_str(), value),
            [value] => ("", value), // A member of a list: `Scope { "value"; };`
            [] => return,
        };
        if name == "#clear" {
            let full = value.to_ascii_lowercase();
            let inside = format!("{full}::");
            self.0.retain(|(key, _)| *key != full && !key.starts_with(&inside));
            return;
        }
        let path: Vec<&str> = scopes.iter().map(String::as_str).chain([name]).collect();
        self.0.push((path.join("::").to_ascii_lowercase(), value.clone()));
    }
}

enum Token {
    Word(String),
    Open,
    Close,
    End,
}

/// Splits apt.conf into words (quotes removed), braces and semicolons; comments are dropped.
fn tokens(text: &str) -> Vec<Token> {
    let mut found = Vec::new();
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        let line_end = rest.find('\n').unwrap_or(rest.len());
        let directive = rest.starts_with("#clear") || rest.starts_with("#include");
        let taken = if rest.starts_with("//") || (first == '#' && !directive) {
            line_end
        } else if let Some(comment) = rest.strip_prefix("/*") {
            comment.find("*/").map_or(rest.len(), |end| end + 4)
        } else if first == '"' {
            let inside = rest[1..].split('"').next().unwrap_or_default();
            found.push(Token::Word(inside.to_owned()));
            (inside.len() + 2).min(rest.len())
        } else {
            match first {
                '{' => found.push(Token::Open),
                '}' => found.push(Token::Close),
                ';' => found.push(Token::End),
                c if c.is_whitespace() => {}
                _ => {
                    let end =
                        rest.find(|c: char| c.is_whitespace() || "{};\"".contains(c)).unwrap_or(rest.len());
                    found.push(Token::Word(rest[..end].to_owned()));
                    rest = &rest[end..];
                    continue;
                }
            }
            first.len_utf8()
        };
        rest = &rest[taken..];
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scopes_lists_comments_and_overrides() {
        let mut conf = AptConf::default();
        conf.parse(
            "// head; {\n# note \"unbalanced\nAPT { NeverAutoRemove { \"^a.*\"; \"^b;{\"; }; };\n\
             Acquire::HTTP::Proxy \"http://old.example:1/\"; /* Acquire::http::Proxy \"no\"; */\n\
             acquire { http { Proxy \"http://proxy.example:3128/\"; Proxy::in.example DIRECT; }; };\n\
             Acquire::Check-Valid-Until \"false\";",
        );
        assert_eq!(conf.get("Acquire::http::Proxy"), Some("http://proxy.example:3128/"));
        assert_eq!(conf.get("acquire::http::proxy::in.example"), Some("DIRECT"));
        assert_eq!(conf.flag("Acquire::Check-Valid-Until"), Some(false));
        assert_eq!(conf.flag("Acquire::Check-Date"), None);
        assert_eq!(conf.get("APT::NeverAutoRemove::"), Some("^b;{"));
        conf.parse("#clear Acquire::http;");
        assert_eq!(conf.get("Acquire::http::Proxy"), None);
        assert_eq!(conf.flag("Acquire::Check-Valid-Until"), Some(false));
    }

    #[test]
    fn unbalanced_input_is_survived() {
        for text in ["}}}", "{{{", "\"", "/*", "a \"b", ";;", "a b", "é\"é", "#clear;"] {
            AptConf::default().parse(text);
        }
    }
}
