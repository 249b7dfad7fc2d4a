-- Look at a part of the records of a server, and list those whose outcome is unknown.
-- ARGV: cursor, pattern, how many keys
-- Reply: {cursor, {key, time of the first claim (ms), ...}}
local found = redis.call('SCAN', ARGV[1], 'MATCH', ARGV[2], 'COUNT', ARGV[3])
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local unresolved = {}
for _, key in ipairs(found[2]) do
  -- Such a record does not expire; most others do, and need no second look.
  if redis.call('PTTL', key) == -1 then
    local record = redis.pcall('HMGET', key, 's', 'h', 'l', 'n')
    local lease, first = tonumber(record[3] or ''), tonumber(record[4] or '')
    local held = record[1] == '1' and record[2] == '1' and lease and lease <= now
    if not record.err and (record[1] == '3' or held) then
      unresolved[#unresolved + 1] = key
      unresolved[#unresolved + 1] = string.format('%.0f', first or 0)
    end
  end
end
return {found[1], unresolved}
