//! Prints a line and ends.
#![no_std]
#![no_main]

bare::guest!(main);

fn main() {
    bare::println!("garbage from a bare-metal guest");
}
