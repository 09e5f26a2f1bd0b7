//! Errors as users see them: one line, and a way out.

use std::fmt;
use std::process::ExitCode;

/// The user asked for something that cannot be: exit status 2.
#[derive(Debug)]
pub struct Usage(pub String);

impl fmt::Display for Usage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Usage {}

/// What to do about an error: attached as context, printed on a line of its own.
#[derive(Debug)]
pub struct Help(pub String);

impl fmt::Display for Help {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Prints `error: …` and `help: …` lines, and gives the status for it.
pub fn report(error: &anyhow::Error) -> ExitCode {
    let help = error.downcast_ref::<Help>().map(|h| h.0.clone());
    let mut lines: Vec<String> = Vec::new();
    for cause in error.chain() {
        let text = cause.to_string();
        // Errors of libraries often repeat their source's text at their end.
        if Some(&text) != help.as_ref() && !lines.iter().any(|l| l.contains(&text)) {
            lines.push(text);
        }
    }
    let message = lines.join(": ");
    // Our own messages say what happened, then after a semicolon what to do.
    match (help, message.rsplit_once("; ")) {
        (Some(help), _) => eprintln!("error: {message}\n  help: {help}"),
        (None, Some((what, help))) => eprintln!("error: {what}\n  help: {help}"),
        (None, None) => eprintln!("error: {message}"),
    }
    let usage = error.downcast_ref::<Usage>().is_some()
        || error.chain().any(|c| c.downcast_ref::<vm::Error>().is_some_and(vm::Error::is_usage));
    ExitCode::from(if usage { 2 } else { 4 })
}
