//! What a benchmark is held to: it says of each promise whether it was kept, and ends with 1 if one was not.

use std::process::ExitCode;

#[derive(Default)]
pub struct Promises {
    broken: bool,
}

impl Promises {
    /// What was measured, and the most that it may be.
    pub fn most(&mut self, what: &str, found: f64, limit: f64, unit: &str) {
        let kept = found <= limit;
        let verdict = if kept { "kept    " } else { "NOT KEPT" };
        println!("promise {verdict}  {what}: {found:.2} {unit}, at most {limit}");
        self.broken |= !kept;
    }

    pub fn code(self) -> ExitCode {
        ExitCode::from(u8::from(self.broken))
    }
}
