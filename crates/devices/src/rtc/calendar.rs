//! Seconds since 1970 and dates of the Gregorian calendar, in UTC.

/// A date and time of day.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Date {
    pub second: u8,
    pub minute: u8,
    pub hour: u8,
    /// 1 is Sunday.
    pub weekday: u8,
    pub day: u8,
    pub month: u8,
    pub year: i64,
}

/// Days before each month of a year that begins in March.
fn days_before(month: i64) -> i64 {
    (153 * month + 2) / 5
}

impl Date {
    /// The date `seconds` after 1970 began.
    pub fn at(seconds: i64) -> Self {
        let (days, second) = (seconds.div_euclid(86_400), seconds.rem_euclid(86_400));
        // Days since 1 March of year 0, in cycles of 400 years; leap days come last in years that begin in March.
        let shifted = days + 719_468;
        let (cycle, day) = (shifted.div_euclid(146_097), shifted.rem_euclid(146_097));
        let year = (day - day / 1_460 + day / 36_524 - day / 146_096) / 365;
        let in_year = day - (365 * year + year / 4 - year / 100);
        let month = (5 * in_year + 2) / 153;
        let january = month >= 10;
        Self {
            second: (second % 60) as u8,
            minute: (second / 60 % 60) as u8,
            hour: (second / 3600) as u8,
            weekday: ((days + 4).rem_euclid(7) + 1) as u8,
            day: (in_year - days_before(month) + 1) as u8,
            month: if january { month - 9 } else { month + 3 } as u8,
            year: cycle * 400 + year + i64::from(january),
        }
    }

    /// Seconds since 1970. Fields out of range carry over into the next.
    pub fn seconds(&self) -> i64 {
        let month = i64::from(self.month).clamp(1, 12);
        let (year, month) = if month > 2 { (self.year, month - 3) } else { (self.year - 1, month + 9) };
        let (cycle, in_cycle) = (year.div_euclid(400), year.rem_euclid(400));
        let days = cycle * 146_097 + in_cycle * 365 + in_cycle / 4 - in_cycle / 100
            + days_before(month)
            + i64::from(self.day)
            - 1
            - 719_468;
        days * 86_400 + i64::from(self.hour) * 3600 + i64::from(self.minute) * 60 + i64::from(self.second)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_the_calendars() {
        for (seconds, date) in [
            (0, (1970, 1, 1, 5)),
            (951_782_400, (2000, 2, 29, 3)),
            (1_709_164_800, (2024, 2, 29, 5)),
            (4_107_542_400, (2100, 3, 1, 2)),
            (1_767_139_200, (2025, 12, 31, 4)),
        ] {
            let d = Date::at(seconds);
            assert_eq!((d.year, d.month, d.day, d.weekday), date);
        }
        for day in (-800_000..800_000i64).step_by(37) {
            let seconds = day * 86_400 + day.rem_euclid(86_400);
            assert_eq!(Date::at(seconds).seconds(), seconds);
        }
    }
}
