//! Ends by a triple fault.
#![no_std]
#![no_main]

bare::guest!(main);

fn main() {
    bare::println!("triple fault next");
    bare::trap::triple_fault();
}
