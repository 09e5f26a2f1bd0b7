//! Progress bars for what takes time before a guest starts.

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// A step of so many bytes.
const KNOWN: &str = "{msg:40!} {bar:30} {bytes:>10}/{total_bytes:<10} {bytes_per_sec:>12}";

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}

/// Shows each step as a bar on standard error, where that is a terminal.
#[derive(Default)]
pub struct Bars(Option<ProgressBar>);

impl images::Progress for Bars {
    fn begin(&mut self, what: &str, total: Option<u64>) {
        self.show(
            what,
            total,
            match total {
                Some(_) => KNOWN,
                None => "{msg:40!} {spinner} {bytes:>10}",
            },
        );
    }

    fn begin_count(&mut self, what: &str, total: u64) {
        self.show(what, Some(total), "{msg:40!} {bar:30} {pos:>10}/{len:<10} {elapsed:>12}");
    }

    fn total(&mut self, bytes: u64) {
        if let Some(bar) = &self.0 {
            bar.set_length(bytes);
            bar.set_style(style(KNOWN));
        }
    }

    fn advance(&mut self, bytes: u64) {
        if let Some(bar) = &self.0 {
            bar.inc(bytes);
        }
    }

    fn finish(&mut self) {
        if let Some(bar) = self.0.take() {
            bar.finish_and_clear();
        }
    }
}

impl Bars {
    fn show(&mut self, what: &str, total: Option<u64>, template: &str) {
        let bar = ProgressBar::with_draw_target(total, ProgressDrawTarget::stderr());
        bar.set_style(style(template));
        bar.set_message(what.to_string());
        bar.enable_steady_tick(std::time::Duration::from_millis(200));
        self.0 = Some(bar);
    }
}
