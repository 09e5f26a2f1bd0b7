//! The register state that instructions work on, and the buffer of their memory operand.

/// The vector, MMX and x87 state of a vCPU, as plain data.
#[repr(C, align(64))]
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SimdState {
    /// YMM0 to YMM15, low half (XMM) first.
    pub ymm: [[u128; 2]; 16],
    /// The physical x87 registers R0 to R7 (so MMi is the low half of entry i, and ST(i) is entry (TOP + i) % 8).
    /// The low 80 bits count; the rest is zero.
    pub fpr: [u128; 8],
    /// MXCSR.
    pub mxcsr: u32,
    /// x87 control word.
    pub fcw: u16,
    /// x87 status word.
    pub fsw: u16,
    /// x87 tags abridged as in FXSAVE: bit i is set when physical register i is not empty.
    pub ftw: u8,
    /// Last opcode, instruction and data pointers of the x87. Never touched here: the caller keeps them.
    pub fop: u16,
    /// See `fop`.
    pub fip: u64,
    /// See `fop`.
    pub fdp: u64,
}

impl Default for SimdState {
    /// The state after reset and FNINIT (SDM vol. 1, 8.1.5 and 10.2.3).
    fn default() -> Self {
        SimdState {
            ymm: [[0; 2]; 16],
            fpr: [0; 8],
            mxcsr: 0x1f80,
            fcw: 0x37f,
            fsw: 0,
            ftw: 0,
            fop: 0,
            fip: 0,
            fdp: 0,
        }
    }
}

/// Size of the XSAVE area in standard format with x87, SSE and AVX.
pub const XSAVE_SIZE: usize = 832;
const XSTATE_BV: usize = 512;
const YMM_HIGH: usize = 576;

impl SimdState {
    /// The x87's TOP: the physical register that is ST(0).
    pub fn top(&self) -> usize {
        usize::from(self.fsw >> 11 & 7)
    }

    /// Writes the x87 part (bytes 0 to 23 and the eight registers in ST order) of an FXSAVE image.
    fn x87_to_fxsave(&self, area: &mut [u8; 512]) {
        area[0..2].copy_from_slice(&self.fcw.to_le_bytes());
        area[2..4].copy_from_slice(&self.fsw.to_le_bytes());
        area[4] = self.ftw;
        for i in 0..8 {
            let value = self.fpr[(self.top() + i) % 8];
            area[32 + 16 * i..42 + 16 * i].copy_from_slice(&value.to_le_bytes()[..10]);
        }
    }

    /// Takes control, status, tags and registers from an FXSAVE image; not the pointers.
    fn x87_from_fxsave(&mut self, area: &[u8; 512]) {
        self.fcw = u16::from_le_bytes([area[0], area[1]]);
        self.fsw = u16::from_le_bytes([area[2], area[3]]);
        self.ftw = area[4];
        for i in 0..8 {
            let mut value = [0; 16];
            value[..10].copy_from_slice(&area[32 + 16 * i..42 + 16 * i]);
            self.fpr[(self.top() + i) % 8] = u128::from_le_bytes(value);
        }
    }

    /// The XSAVE area (standard format; x87, SSE and AVX components all present) that holds this state.
    pub fn to_xsave(&self) -> [u8; XSAVE_SIZE] {
        let mut legacy = [0; 512];
        self.x87_to_fxsave(&mut legacy);
        let mut area = [0; XSAVE_SIZE];
        area[..512].copy_from_slice(&legacy);
        area[6..8].copy_from_slice(&self.fop.to_le_bytes());
        area[8..16].copy_from_slice(&self.fip.to_le_bytes());
        area[16..24].copy_from_slice(&self.fdp.to_le_bytes());
        area[24..28].copy_from_slice(&self.mxcsr.to_le_bytes());
        area[XSTATE_BV] = 7;
        for (i, [low, high]) in self.ymm.iter().enumerate() {
            area[160 + 16 * i..176 + 16 * i].copy_from_slice(&low.to_le_bytes());
            area[YMM_HIGH + 16 * i..YMM_HIGH + 16 + 16 * i].copy_from_slice(&high.to_le_bytes());
        }
        area
    }

    /// The state in an XSAVE area of standard format; components that XSTATE_BV calls initial are so.
    pub fn from_xsave(area: &[u8; XSAVE_SIZE]) -> Self {
        let word = |at: usize| u128::from_le_bytes(std::array::from_fn(|i| area[at + i]));
        let present = area[XSTATE_BV];
        let mut state = SimdState { mxcsr: word(24) as u32, ..SimdState::default() };
        if present & 1 != 0 {
            state.x87_from_fxsave(&std::array::from_fn(|i| area[i]));
            state.fop = word(6) as u16;
            state.fip = word(8) as u64;
            state.fdp = word(16) as u64;
        }
        for i in 0..16 {
            if present & 2 != 0 {
                state.ymm[i][0] = word(160 + 16 * i);
            }
            if present & 4 != 0 {
                state.ymm[i][1] = word(YMM_HIGH + 16 * i);
            }
        }
        state
    }
}

/// An FXSAVE image for the slow path of x87 instructions: nothing of the guest but its x87.
#[repr(C, align(16))]
pub(crate) struct FxArea(pub [u8; 512]);

impl FxArea {
    pub fn load(state: &SimdState) -> Self {
        let mut area = [0; 512];
        state.x87_to_fxsave(&mut area);
        area[24..28].copy_from_slice(&0x1f80u32.to_le_bytes());
        FxArea(area)
    }

    pub fn store(&self, state: &mut SimdState) {
        state.x87_from_fxsave(&self.0);
    }
}

/// The memory operand of an instruction, and what a stub takes and gives besides registers.
#[repr(C, align(64))]
#[derive(Debug, Clone)]
pub struct Bounce {
    /// The operand, from byte 0 on: read by loads, written by stores.
    pub bytes: [u8; 64],
    pub(crate) mxcsr: u32,
    pub(crate) fcw: u16,
    /// In: the exception flags that the guest does not have set. Out: the host's status word.
    pub(crate) fsw: u16,
    pub(crate) flags: u64,
}

impl Default for Bounce {
    fn default() -> Self {
        Bounce { bytes: [0; 64], mxcsr: 0, fcw: 0, fsw: 0, flags: 0 }
    }
}
