//! The second CPU.
#[unsafe(no_mangle)]
extern "C" fn second_main() -> ! {
    loop {}
}
