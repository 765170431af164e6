//! Link options of the static release executable, for size. They stand here and not in RUSTFLAGS or `.cargo/config.toml`,
//! because the variable replaces the file's flags, and the same short command must give everybody the same executable.

use std::env::var;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=build.ld");
    println!("cargo::rustc-check-cfg=cfg(lean)");
    let has = |name: &str, value: &str| var(name).is_ok_and(|found| found.split(',').any(|one| one == value));
    let release = has("PROFILE", "release") && has("CARGO_CFG_TARGET_ENV", "gnu");
    if !release || !has("CARGO_CFG_TARGET_FEATURE", "crt-static") {
        return;
    }
    // Relative relocations, all that a static-pie has, as a bitmap instead of 24 bytes each. lld and GNU ld know it since
    // their versions 15 and 2.38, glibc's static start-up code since 2.36.
    println!("cargo::rustc-link-arg-bins=-Wl,-z,pack-relative-relocs");
    // No tables for unwinding: see build.ld.
    println!("cargo::rustc-link-arg-bins=-Wl,--no-eh-frame-hdr");
    println!("cargo::rustc-link-arg-bins=-Wl,-T,{}/build.ld", var("CARGO_MANIFEST_DIR").unwrap_or_default());
    // src/sys/lean.rs replaces functions out of larger members of archives: the first definition stays.
    println!("cargo::rustc-cfg=lean");
    println!("cargo::rustc-link-arg-bins=-Wl,-z,muldefs");
    // Functions with the same machine code become one, 30 KB. Nothing may tell them apart by their addresses: Rust promises
    // none for functions, and nothing here compares any. Only lld can do it, which rustc brings along and uses
    // for this target since 1.90.
    if has("CARGO_CFG_TARGET_ARCH", "x86_64") {
        println!("cargo::rustc-link-arg-bins=-Wl,--icf=all");
    }
}
