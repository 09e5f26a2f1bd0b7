use netctl::Answer;

/// Why something was not done, in one sentence, and what to do about it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{why}")]
pub struct Error {
    /// Why.
    pub why: String,
    /// What to do.
    pub help: Option<String>,
}

/// What may fail with words for the user.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// One without a remedy.
    pub fn new(why: impl Into<String>) -> Self {
        Self { why: why.into(), help: None }
    }

    /// Tells what to do about it.
    pub fn help(mut self, help: impl Into<String>) -> Self {
        self.help = Some(help.into());
        self
    }
}

impl From<Error> for Answer {
    fn from(Error { why, help }: Error) -> Self {
        Self::Refused { why, help }
    }
}

/// Tells what failed.
pub trait Context<T> {
    /// Says what could not be done: "the bridge cannot be made".
    ///
    /// # Errors
    /// The same ones, in words.
    fn context(self, what: impl FnOnce() -> String) -> Result<T>;
}

impl<T, E: std::fmt::Display> Context<T> for std::result::Result<T, E> {
    fn context(self, what: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|error| Error::new(format!("{}: {error}", what())))
    }
}
