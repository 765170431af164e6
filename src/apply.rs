//! Carries out plans on the kernel: observe, apply, undo.
