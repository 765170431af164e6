//! Dispatch by the name the program is called under.

fn main() {
    println!("enibox {}", enibox::VERSION);
}
