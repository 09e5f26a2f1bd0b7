//! How far a long step has come, for whoever watches.

/// Is told of each step that takes time. Steps do not overlap: `begin`, `advance` any number of times, `finish`.
pub trait Progress {
    /// A step begins: what it is, in a few words for people, and how many bytes it takes where that is known.
    fn begin(&mut self, what: &str, total: Option<u64>);
    /// A step begins that takes so many smaller ones, each an `advance` by 1.
    fn begin_count(&mut self, what: &str, total: u64) {
        self.begin(what, Some(total));
    }
    /// It is known by now that the step takes so many bytes.
    fn total(&mut self, _bytes: u64) {}
    /// So many bytes more are done.
    fn advance(&mut self, bytes: u64);
    /// The step has ended, well or not.
    fn finish(&mut self);
    /// Something that does not prevent the result but that people should know: one sentence. Between steps.
    fn note(&mut self, _text: &str) {}
}

/// Tells nobody.
#[derive(Debug, Default, Clone, Copy)]
pub struct Silent;

impl Progress for Silent {
    fn begin(&mut self, _what: &str, _total: Option<u64>) {}
    fn advance(&mut self, _bytes: u64) {}
    fn finish(&mut self) {}
}
