//! The word to stop, for servers that block in the kernel: instead of polling a flag, each registers what wakes it.

use std::sync::{Arc, Mutex, PoisonError};

type Wake = Box<dyn FnOnce() + Send>;

#[derive(Default)]
struct State {
    stopped: bool,
    wakes: Vec<Wake>,
}

/// Clones are one and the same.
#[derive(Clone, Default)]
pub struct Stop(Arc<Mutex<State>>);

impl Stop {
    /// Not stopped yet.
    pub fn new() -> Self {
        Stop::default()
    }

    /// Stops for good: everything registered runs once, on this thread.
    pub fn stop(&self) {
        let wakes = {
            let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            state.stopped = true;
            std::mem::take(&mut state.wakes)
        };
        for wake in wakes {
            wake();
        }
    }

    /// Whether [`Stop::stop`] was called.
    pub fn is_stopped(&self) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).stopped
    }

    /// Runs `wake` when stopped; at once if that was before. It must not block.
    pub fn on_stop(&self, wake: impl FnOnce() + Send + 'static) {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if state.stopped {
            drop(state);
            wake();
        } else {
            state.wakes.push(Box::new(wake));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU32, Ordering};

    #[test]
    fn everything_registered_runs_once_whether_before_or_after() {
        let (stop, count) = (Stop::new(), Arc::new(AtomicU32::new(0)));
        let wake = || {
            let count = Arc::clone(&count);
            move || {
                count.fetch_add(1, Ordering::Relaxed);
            }
        };
        stop.on_stop(wake());
        stop.clone().on_stop(wake());
        assert!(!stop.is_stopped());
        assert_eq!(count.load(Ordering::Relaxed), 0);
        stop.stop();
        stop.stop();
        stop.on_stop(wake());
        assert!(stop.is_stopped());
        assert_eq!(count.load(Ordering::Relaxed), 3);
    }
}
