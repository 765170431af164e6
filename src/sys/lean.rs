//! Functions of the C library and of libgcc, again and smaller: 500 KB less in the static release executable. Cryptography
//! is not among them: ring's table of 154 KB for the curve P-256 stays.
//!
//! The linker takes the first definition of a symbol that it meets, which is ours, and leaves out of the archives what
//! nobody asks for any more (build.rs; CONTRIBUTING tells how to see who asks for what). So each function here must do
//! all that its callers want of it, and may be slow: none of them is called more than a few times per request. Where the
//! C library's own name is another, as in other versions of it, nothing breaks; the executable is larger.
//!
//! It must not panic, allocate or use thread locals in the functions for strings: they run before anything is set up.

use std::ffi::{CStr, c_char, c_int};
#[cfg(not(test))]
use std::ffi::{c_uint, c_void};

/// Compares at most `limit` bytes of two strings, up to their ends.
unsafe fn compare(one: *const u8, other: *const u8, limit: usize, fold: fn(&u8) -> u8) -> c_int {
    for at in 0..limit {
        // SAFETY: both strings have a byte here: no end has come before it.
        let (left, right) = unsafe { (fold(&*one.add(at)), fold(&*other.add(at))) };
        if left != right || left == 0 {
            return c_int::from(left) - c_int::from(right);
        }
    }
    0
}

#[cfg_attr(not(test), unsafe(no_mangle))]
unsafe extern "C" fn strcmp(one: *const u8, other: *const u8) -> c_int {
    // SAFETY: the caller gives two strings.
    unsafe { compare(one, other, usize::MAX, u8::clone) }
}

#[cfg_attr(not(test), unsafe(no_mangle))]
unsafe extern "C" fn strncmp(one: *const u8, other: *const u8, limit: usize) -> c_int {
    // SAFETY: the caller gives two strings, or `limit` bytes of them.
    unsafe { compare(one, other, limit, u8::clone) }
}

/// Letters are ASCII's: the program never leaves the locale that it starts in, `C`.
#[cfg_attr(not(test), unsafe(no_mangle))]
unsafe extern "C" fn strcasecmp(one: *const u8, other: *const u8) -> c_int {
    // SAFETY: the caller gives two strings.
    unsafe { compare(one, other, usize::MAX, u8::to_ascii_lowercase) }
}

#[cfg_attr(not(test), unsafe(no_mangle))]
unsafe extern "C" fn strncasecmp(one: *const u8, other: *const u8, limit: usize) -> c_int {
    // SAFETY: the caller gives two strings, or `limit` bytes of them.
    unsafe { compare(one, other, limit, u8::to_ascii_lowercase) }
}

/// The names by which the C library calls the same functions itself; a locale, where there is one, is `C`.
#[cfg(not(test))]
mod inside {
    use super::{c_int, stpcpy, strcasecmp, strncasecmp};

    #[unsafe(no_mangle)]
    unsafe extern "C" fn __stpcpy(to: *mut u8, from: *const u8) -> *mut u8 {
        // SAFETY: as there.
        unsafe { stpcpy(to, from) }
    }

    #[unsafe(no_mangle)]
    unsafe extern "C" fn __strcasecmp(one: *const u8, other: *const u8) -> c_int {
        // SAFETY: as there.
        unsafe { strcasecmp(one, other) }
    }

    #[unsafe(no_mangle)]
    unsafe extern "C" fn __strcasecmp_l(one: *const u8, other: *const u8, _locale: *const u8) -> c_int {
        // SAFETY: as there.
        unsafe { strcasecmp(one, other) }
    }

    #[unsafe(no_mangle)]
    unsafe extern "C" fn __strncasecmp(one: *const u8, other: *const u8, limit: usize) -> c_int {
        // SAFETY: as there.
        unsafe { strncasecmp(one, other, limit) }
    }

    #[unsafe(no_mangle)]
    unsafe extern "C" fn __strncasecmp_l(one: *const u8, other: *const u8, limit: usize, _: *const u8) -> c_int {
        // SAFETY: as there.
        unsafe { strncasecmp(one, other, limit) }
    }
}

/// Copies a string into a field of `size` bytes, the rest of which becomes zero.
#[cfg_attr(not(test), unsafe(no_mangle))]
unsafe extern "C" fn strncpy(to: *mut u8, from: *const u8, size: usize) -> *mut u8 {
    let mut ended = false;
    for at in 0..size {
        // SAFETY: the field has `size` bytes; nothing is read behind the string's end.
        unsafe {
            let byte = if ended { 0 } else { *from.add(at) };
            ended = byte == 0;
            *to.add(at) = byte;
        }
    }
    to
}

/// Copies a string and returns its end.
#[cfg_attr(not(test), unsafe(no_mangle))]
unsafe extern "C" fn stpcpy(to: *mut u8, from: *const u8) -> *mut u8 {
    let mut at = 0;
    loop {
        // SAFETY: the caller gives a string and room for all of it.
        unsafe {
            *to.add(at) = *from.add(at);
            if *from.add(at) == 0 {
                return to.add(at);
            }
        }
        at += 1;
    }
}

#[cfg_attr(not(test), unsafe(no_mangle))]
unsafe extern "C" fn strcpy(to: *mut u8, from: *const u8) -> *mut u8 {
    // SAFETY: as there.
    unsafe { stpcpy(to, from) };
    to
}

/// Translates a message: there are no catalogues of messages, so it stays as it is.
#[cfg_attr(not(test), unsafe(no_mangle))]
extern "C" fn __dcgettext(_domain: *const c_char, message: *const c_char, _category: c_int) -> *const c_char {
    message
}

/// As [`__dcgettext`].
#[cfg_attr(not(test), unsafe(no_mangle))]
extern "C" fn dcgettext(domain: *const c_char, message: *const c_char, category: c_int) -> *const c_char {
    __dcgettext(domain, message, category)
}

/// Reads two numbers. Its one caller is `pthread_getattr_np`, which looks for the main thread's stack in
/// `/proc/self/maps`; any other format is told to be at its end. In C it takes a variable number of arguments, which
/// makes no difference to where the first four are passed on the processors that the link options are for.
#[cfg_attr(not(test), unsafe(no_mangle))]
unsafe extern "C" fn __isoc99_sscanf(
    text: *const c_char,
    format: *const c_char,
    from: *mut usize,
    to: *mut usize,
) -> c_int {
    const EOF: c_int = -1;
    // SAFETY: the caller gives two strings.
    let (text, format) = unsafe { (CStr::from_ptr(text), CStr::from_ptr(format)) };
    if format != c"%lx-%lx" {
        return EOF;
    }
    let Some((low, high)) = text.to_str().ok().and_then(range) else {
        return 0;
    };
    // SAFETY: the format says that two numbers of the machine's width follow.
    unsafe {
        *from = low;
        *to = high;
    }
    2
}

/// The addresses at the beginning of a line of `/proc/self/maps`.
fn range(line: &str) -> Option<(usize, usize)> {
    let (low, high) = line.split_whitespace().next()?.split_once('-')?;
    Some((usize::from_str_radix(low, 16).ok()?, usize::from_str_radix(high, 16).ok()?))
}

/// Nothing can be loaded into a static executable: only modules of the very same glibc would work, and the host of the
/// plugin may have others. `files` and `dns`, which names are looked up in, are built in; without the others
/// (`nsswitch.conf`) the search goes on with the next.
#[cfg(not(test))]
mod loading {
    use super::{c_char, c_int, c_void};
    use std::ptr::null_mut;

    #[unsafe(no_mangle)]
    extern "C" fn __libc_dlopen_mode(_name: *const c_char, _mode: c_int) -> *mut c_void {
        null_mut()
    }

    #[unsafe(no_mangle)]
    extern "C" fn __libc_dlsym(_library: *mut c_void, _name: *const c_char) -> *mut c_void {
        null_mut()
    }

    #[unsafe(no_mangle)]
    extern "C" fn __libc_dlvsym(_library: *mut c_void, _name: *const c_char, _version: *const c_char) -> *mut c_void {
        null_mut()
    }

    #[unsafe(no_mangle)]
    extern "C" fn __libc_dlclose(_library: *mut c_void) -> c_int {
        0
    }

    // The standard library asks for functions that newer versions of glibc have; there are no dynamic symbols to find.
    #[unsafe(no_mangle)]
    extern "C" fn dlsym(_library: *mut c_void, _name: *const c_char) -> *mut c_void {
        null_mut()
    }
}

/// What C's `printf` formats floating point with: no C code here prints any.
#[cfg(not(test))]
mod floating {
    use super::{c_int, c_void};

    const FAILED: c_int = -1;

    #[unsafe(no_mangle)]
    extern "C" fn __printf_fp(_stream: *mut c_void, _format: *const c_void, _values: *const c_void) -> c_int {
        FAILED
    }

    #[unsafe(no_mangle)]
    extern "C" fn __printf_fphex(_stream: *mut c_void, _format: *const c_void, _values: *const c_void) -> c_int {
        FAILED
    }
}

/// Prints to a stream of C's. What is left to print are complaints about `/etc/host.conf`, which is obsolete.
#[cfg(not(test))]
#[unsafe(no_mangle)]
extern "C" fn __fxprintf() -> c_int {
    0
}

/// Ends the program on an assertion of the C library's.
#[cfg(not(test))]
#[unsafe(no_mangle)]
unsafe extern "C" fn __assert_fail(
    assertion: *const c_char,
    file: *const c_char,
    line: c_uint,
    _function: *const c_char,
) -> ! {
    // SAFETY: the compiler of the assertion gives two strings.
    let [assertion, file] = unsafe { [CStr::from_ptr(assertion), CStr::from_ptr(file)] }.map(CStr::to_str);
    eprintln!("{}:{line}: assertion failed: {}", file.unwrap_or_default(), assertion.unwrap_or_default());
    std::process::abort()
}

/// Ends every walk over the stack before it begins. The executable that this stands in has neither tables for unwinding
/// nor symbols (build.ld), so that the unwinder of libgcc, which this replaces, could not find a single frame either; but
/// with a walk that never yields a frame the optimiser drops the standard library's reader of debug information, 220 KB.
/// A panic still tells its place and its reason.
#[cfg(not(test))]
#[unsafe(no_mangle)]
extern "C" fn _Unwind_Backtrace(_each: *const c_void, _state: *const c_void) -> c_int {
    const END_OF_STACK: c_int = 5; // _URC_END_OF_STACK in unwind.h
    END_OF_STACK
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strings_compare_and_copy_as_in_the_c_library() {
        let texts = [c"", c"a", c"A", c"ab", c"aB", c"b", c"ends", c"endsWith", c"\xc3\xa4", c"[", c"{"];
        for one in texts {
            for other in texts {
                let (left, right) = (one.as_ptr(), other.as_ptr());
                let bytes = |text: *const c_char| text.cast::<u8>();
                let mut copy = [7_u8; 10];
                // SAFETY: all are strings of C.
                unsafe {
                    let check = |ours: c_int, libc: c_int| {
                        assert_eq!(ours.signum(), libc.signum(), "{one:?} {other:?}");
                    };
                    check(strcmp(bytes(left), bytes(right)), libc::strcmp(left, right));
                    check(strcasecmp(bytes(left), bytes(right)), libc::strcasecmp(left, right));
                    assert_eq!(strcpy(copy.as_mut_ptr(), bytes(left)), copy.as_mut_ptr());
                    let size = one.to_bytes_with_nul().len();
                    assert_eq!((&copy[..size], copy[size]), (one.to_bytes_with_nul(), 7));
                    assert_eq!(stpcpy(copy.as_mut_ptr(), bytes(left)), copy.as_mut_ptr().add(size - 1));
                    for limit in 0..9 {
                        check(strncmp(bytes(left), bytes(right), limit), libc::strncmp(left, right, limit));
                        check(strncasecmp(bytes(left), bytes(right), limit), libc::strncasecmp(left, right, limit));
                        let (mut ours, mut theirs) = ([7_u8; 10], [7_u8; 10]);
                        assert_eq!(strncpy(ours.as_mut_ptr(), bytes(left), limit), ours.as_mut_ptr());
                        libc::strncpy(theirs.as_mut_ptr().cast(), left, limit);
                        assert_eq!(ours, theirs, "{one:?} {limit}");
                    }
                }
            }
        }
    }

    #[test]
    fn the_stack_is_found_among_the_maps() {
        let check = |text: &CStr, format: &CStr, expected: (c_int, usize, usize)| {
            let (mut from, mut to) = (1, 2);
            // SAFETY: two strings and two numbers.
            let got = unsafe { __isoc99_sscanf(text.as_ptr(), format.as_ptr(), &raw mut from, &raw mut to) };
            assert_eq!((got, from, to), expected, "{text:?} {format:?}");
        };
        let line = c"7ffc1000-7ffc3000 rw-p 00000000 00:00 0                          [stack]\n";
        check(line, c"%lx-%lx", (2, 0x7ffc_1000, 0x7ffc_3000));
        check(line, c"%lx", (-1, 1, 2));
        for wrong in [c"", c"\n", c"7ffc1000", c"7ffc1000-", c"x-y"] {
            check(wrong, c"%lx-%lx", (0, 1, 2));
        }
    }

    #[test]
    fn messages_stay_as_they_are() {
        let message = c"No such file";
        assert_eq!(dcgettext(std::ptr::null(), message.as_ptr(), 5), message.as_ptr());
    }
}
